/* A libnvidia-ml.so.1 of invented GPUs, for tests: built by tests/nvml_stub.py, used through the real nvidia-ml-py.

   It is stricter than the real one. Nothing works before nvmlInit or after the last nvmlShutdown; handles die with
   the session that gave them; a structure of the wrong version or a buffer that is too small is refused; and a call
   that fails leaves rubbish in its outputs, so that a caller who ignores the return code reads rubbish.

   The scenario is read from the environment at each call, so a test may change it while a program runs. Lists are
   separated by commas, one entry for each GPU in NVML's order, which is that of PCI bus ids:

     NVML_STUB_GPUS       how many (1)
     NVML_STUB_UUIDS      GPU-00000000-0000-0000-0000-00000000000<index>
     NVML_STUB_NAMES      Stub GPU <index>
     NVML_STUB_MIG        MIG instances of each (0); their UUIDs are MIG-<gpu>0000000-0000-0000-0000-00000000000<instance>
     NVML_STUB_PROCESSES  <gpu>[/<instance>]:<pid or self>:<MiB, or ? where the driver does not tell>
     NVML_STUB_USED       MiB in use (0), of 81920
     NVML_STUB_ENERGY     millijoules at the first, second, ... reading of each GPU; the last repeats (1000000)
     NVML_STUB_CLOCK      MHz of the SMs, likewise (1980)
     NVML_STUB_REASONS    throttle reasons, likewise (0)
     NVML_STUB_DRIVER     580.65.06
     NVML_STUB_CUDA       13000
     NVML_STUB_FAIL       <function>=<error code>[@<calls that succeed first>]
     NVML_STUB_LOST       indices of GPUs that have fallen off the bus
     NVML_STUB_LOG        a file to which the name of each function called is appended
*/
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15,
       ARGUMENT_VERSION_MISMATCH = 25 };
enum { MOST_GPUS = 16, MOST_INSTANCES = 8, MOST_CALLS = 128 };
#define MIB 1048576ull
#define RUBBISH 0xDEADBEEFu

typedef struct { int gpu, instance; unsigned session; } Device; /* instance -1: the whole GPU */
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* programs read from threads */
static unsigned users, session;
static Device devices[MOST_GPUS][MOST_INSTANCES + 1];
static struct { const char *name; int calls; } seen[MOST_CALLS];
static int readings[3][MOST_GPUS];

static const char *setting(const char *name, const char *otherwise) {
    char variable[64];
    snprintf(variable, sizeof variable, "NVML_STUB_%s", name);
    const char *value = getenv(variable);
    return value && *value ? value : otherwise;
}

/* Entry `index` of a list, or its last one; false for an empty list or, unless `last_repeats`, beyond its end. */
static int entry(const char *list, int index, int last_repeats, char *out, size_t size) {
    const char *start = list;
    if (!*list) return 0;
    for (int i = 0; i < index; i++) {
        const char *comma = strchr(start, ',');
        if (!comma && last_repeats) break;
        if (!comma) return 0;
        start = comma + 1;
    }
    snprintf(out, size, "%.*s", (int)strcspn(start, ","), start);
    return 1;
}

static unsigned long long number(const char *name, int index, int last_repeats, unsigned long long otherwise) {
    char word[64];
    return entry(setting(name, ""), index, last_repeats, word, sizeof word) ? strtoull(word, 0, 0) : otherwise;
}

static unsigned long long next_reading(int which, const char *name, int gpu, unsigned long long otherwise) {
    return number(name, readings[which][gpu]++, 1, otherwise);
}

static int gpus(void) { return atoi(setting("GPUS", "1")); }

static int instances(int gpu) { return (int)number("MIG", gpu, 0, 0); }

static int lost(int gpu) {
    char word[16];
    for (int i = 0; entry(setting("LOST", ""), i, 0, word, sizeof word); i++)
        if (atoi(word) == gpu) return 1;
    return 0;
}

static void uuid_of(int gpu, int instance, char *out, size_t size) {
    if (instance >= 0)
        snprintf(out, size, "MIG-%d0000000-0000-0000-0000-00000000000%d", gpu, instance);
    else if (!entry(setting("UUIDS", ""), gpu, 0, out, size))
        snprintf(out, size, "GPU-00000000-0000-0000-0000-00000000000%d", gpu);
}

/* What every function does first: log, fail as the scenario says, refuse without a session. */
static int enter(const char *name, int needs_session) {
    const char *log = setting("LOG", "");
    if (*log) {
        FILE *file = fopen(log, "a");
        if (file) { fprintf(file, "%s\n", name); fclose(file); }
    }
    pthread_mutex_lock(&lock);
    int slot = 0;
    while (slot < MOST_CALLS - 1 && seen[slot].name && strcmp(seen[slot].name, name)) slot++;
    seen[slot].name = name;
    int calls = seen[slot].calls++;
    pthread_mutex_unlock(&lock);
    char rule[128];
    for (int i = 0; entry(setting("FAIL", ""), i, 0, rule, sizeof rule); i++) {
        char *code = strchr(rule, '=');
        if (!code) continue;
        *code++ = 0;
        char *after = strchr(code, '@');
        if (!strcmp(rule, name) && calls >= (after ? atoi(after + 1) : 0)) return atoi(code);
    }
    return needs_session && !users ? UNINITIALIZED : SUCCESS;
}

static int known(const Device *device) {
    if ((const char *)device < (const char *)devices || (const char *)device >= (const char *)(devices + MOST_GPUS))
        return 0;
    return device->session == session && device->gpu < gpus() && device->instance < instances(device->gpu);
}

static int enter_device(const char *name, const Device *device, int whole_gpu_only) {
    int code = enter(name, 1);
    if (code) return code;
    if (!known(device)) return INVALID_ARGUMENT;
    if (lost(device->gpu)) return GPU_IS_LOST;
    return whole_gpu_only && device->instance >= 0 ? NOT_SUPPORTED : SUCCESS;
}

static int give(int gpu, int instance, Device **out) {
    Device *device = &devices[gpu][instance + 1];
    *device = (Device){gpu, instance, session};
    *out = device;
    return SUCCESS;
}

static int write_text(char *out, unsigned size, const char *text) {
    if (!out) return INVALID_ARGUMENT;
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

#define API __attribute__((visibility("default"))) int
#define ENTER_SYSTEM() do { int code = enter(__func__, 1); if (code) return code; } while (0)
#define ENTER(device, whole, out, rubbish) do { int code = enter_device(__func__, device, whole); \
    if (!code && !(out)) code = INVALID_ARGUMENT; \
    if (code) { if (out) *(out) = rubbish; return code; } } while (0)

/* For the fixture: as if the library had just been loaded. */
API nvmlStubReset(void) {
    users = 0, session++;
    memset(seen, 0, sizeof seen), memset(readings, 0, sizeof readings);
    return SUCCESS;
}

API nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = enter(__func__, 0);
    if (!code && users++ == 0) session++;
    return code;
}

API nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

API nvmlShutdown(void) {
    ENTER_SYSTEM();
    users--;
    return SUCCESS;
}

__attribute__((visibility("default"))) const char *nvmlErrorString(int code) {
    switch (code) { /* nvidia-ml-py has texts of its own for most */
    case NOT_SUPPORTED: return "Not Supported";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "stub error";
    }
}

API nvmlSystemGetDriverVersion(char *out, unsigned size) {
    ENTER_SYSTEM();
    return write_text(out, size, setting("DRIVER", "580.65.06"));
}

API nvmlSystemGetNVMLVersion(char *out, unsigned size) {
    ENTER_SYSTEM();
    return write_text(out, size, setting("DRIVER", "13.580.65.06"));
}

static int cuda_version(int *out) {
    if (!out) return INVALID_ARGUMENT;
    *out = atoi(setting("CUDA", "13000"));
    return SUCCESS;
}

API nvmlSystemGetCudaDriverVersion(int *out) { ENTER_SYSTEM(); return cuda_version(out); }

API nvmlSystemGetCudaDriverVersion_v2(int *out) { ENTER_SYSTEM(); return cuda_version(out); }

API nvmlDeviceGetCount_v2(unsigned *out) {
    ENTER_SYSTEM();
    if (!out) return INVALID_ARGUMENT;
    *out = gpus();
    return SUCCESS;
}

API nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out) {
    ENTER_SYSTEM();
    if (!out || index >= (unsigned)gpus()) return INVALID_ARGUMENT;
    return lost(index) ? GPU_IS_LOST : give(index, -1, out);
}

API nvmlDeviceGetHandleByUUID(const char *uuid, Device **out) {
    ENTER_SYSTEM();
    if (!uuid || !out) return INVALID_ARGUMENT;
    for (int gpu = 0; gpu < gpus(); gpu++)
        for (int instance = -1; instance < instances(gpu); instance++) {
            char own[96];
            uuid_of(gpu, instance, own, sizeof own);
            if (!strcmp(own, uuid)) return lost(gpu) ? GPU_IS_LOST : give(gpu, instance, out);
        }
    return strncmp(uuid, "GPU-", 4) && strncmp(uuid, "MIG-", 4) ? INVALID_ARGUMENT : NOT_FOUND;
}

API nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Device **out) {
    ENTER_SYSTEM();
    unsigned domain, bus, slot;
    if (!bus_id || !out || sscanf(bus_id, "%x:%x:%x.0", &domain, &bus, &slot) != 3) return INVALID_ARGUMENT;
    int gpu = (int)bus / 16 - 1;
    if (domain || slot || bus % 16 || gpu < 0 || gpu >= gpus()) return NOT_FOUND;
    return lost(gpu) ? GPU_IS_LOST : give(gpu, -1, out);
}

API nvmlDeviceGetUUID(Device *device, char *out, unsigned size) {
    char uuid[96];
    ENTER(device, 0, out, '?');
    uuid_of(device->gpu, device->instance, uuid, sizeof uuid);
    return write_text(out, size, uuid);
}

API nvmlDeviceGetName(Device *device, char *out, unsigned size) {
    char name[96];
    ENTER(device, 0, out, '?');
    if (!entry(setting("NAMES", ""), device->gpu, 0, name, sizeof name))
        snprintf(name, sizeof name, "Stub GPU %d", device->gpu);
    return write_text(out, size, name);
}

API nvmlDeviceGetIndex(Device *device, unsigned *out) {
    ENTER(device, 0, out, RUBBISH);
    *out = device->instance < 0 ? device->gpu : device->instance;
    return SUCCESS;
}

API nvmlDeviceGetPciInfo_v3(Device *device, Pci *out) {
    Pci rubbish;
    memset(&rubbish, 0xDE, sizeof rubbish);
    ENTER(device, 1, out, rubbish);
    *out = (Pci){.bus = 16 * (device->gpu + 1), .id = 0x233010DE};
    snprintf(out->legacy, sizeof out->legacy, "0000:%02X:00.0", out->bus);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
    return SUCCESS;
}

API nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    ENTER(device, 0, major, -1);
    *major = 9, *minor = 0;
    return SUCCESS;
}

API nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    ENTER(device, 1, current, RUBBISH);
    if (!*setting("MIG", "")) return NOT_SUPPORTED; /* as GPUs answer that cannot be divided */
    *current = *pending = instances(device->gpu) > 0;
    return SUCCESS;
}

API nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *out) {
    ENTER(device, 1, out, RUBBISH);
    *out = *setting("MIG", "") ? 7 : 0;
    return SUCCESS;
}

API nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **out) {
    ENTER(device, 1, out, (Device *)1);
    if (index >= 7) return INVALID_ARGUMENT;
    return index < (unsigned)instances(device->gpu) ? give(device->gpu, index, out) : NOT_FOUND;
}

API nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *out) {
    ENTER(device, 0, out, RUBBISH);
    *out = device->instance >= 0;
    return SUCCESS;
}

API nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *device, Device **out) {
    ENTER(device, 0, out, (Device *)1);
    return device->instance < 0 ? INVALID_ARGUMENT : give(device->gpu, -1, out);
}

API nvmlDeviceGetMemoryInfo(Device *device, Memory *out) {
    ENTER(device, 0, out, ((Memory){RUBBISH, RUBBISH, RUBBISH}));
    unsigned long long used = number("USED", device->gpu, 0, 0) * MIB;
    *out = (Memory){81920 * MIB, 81920 * MIB - used, used};
    return SUCCESS;
}

API nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *out) {
    int code = enter_device(__func__, device, 0);
    if (code || !out) return code ? code : INVALID_ARGUMENT;
    if (out->version != (sizeof(MemoryV2) | 2 << 24)) return ARGUMENT_VERSION_MISMATCH;
    unsigned long long used = number("USED", device->gpu, 0, 0) * MIB, reserved = 512 * MIB;
    *out = (MemoryV2){out->version, 81920 * MIB, reserved, 81920 * MIB - reserved - used, used};
    return SUCCESS;
}

API nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *out) {
    ENTER(device, 1, out, RUBBISH);
    *out = next_reading(0, "ENERGY", device->gpu, 1000000);
    return SUCCESS;
}

API nvmlDeviceGetClockInfo(Device *device, unsigned kind, unsigned *out) {
    ENTER(device, 1, out, RUBBISH);
    if (kind > 3) return INVALID_ARGUMENT;
    *out = kind == 1 ? next_reading(1, "CLOCK", device->gpu, 1980) : 2619;
    return SUCCESS;
}

API nvmlDeviceGetMaxClockInfo(Device *device, unsigned kind, unsigned *out) {
    ENTER(device, 1, out, RUBBISH);
    if (kind > 3) return INVALID_ARGUMENT;
    *out = kind == 1 ? 1980 : 2619;
    return SUCCESS;
}

API nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *out) {
    ENTER(device, 1, out, RUBBISH);
    *out = next_reading(2, "REASONS", device->gpu, 0);
    return SUCCESS;
}

API nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *out) {
    ENTER(device, 1, out, RUBBISH);
    *out = next_reading(2, "REASONS", device->gpu, 0);
    return SUCCESS;
}

API nvmlDeviceGetUtilizationRates(Device *device, Utilization *out) {
    ENTER(device, 1, out, ((Utilization){RUBBISH, RUBBISH}));
    if (instances(device->gpu)) return NOT_SUPPORTED; /* NVML: not where the GPU is divided */
    *out = (Utilization){87, 40};
    return SUCCESS;
}

API nvmlDeviceGetPowerUsage(Device *device, unsigned *out) {
    ENTER(device, 1, out, RUBBISH);
    *out = 431000;
    return SUCCESS;
}

API nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *out) {
    ENTER(device, 1, out, RUBBISH);
    *out = 700000;
    return SUCCESS;
}

API nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *out) {
    ENTER(device, 1, out, RUBBISH);
    if (sensor) return INVALID_ARGUMENT;
    *out = 61;
    return SUCCESS;
}

API nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *out) {
    int code = enter_device(__func__, device, 0);
    if (code || !count) return code ? code : INVALID_ARGUMENT;
    unsigned found = 0, room = *count;
    char word[96], pid[24], used[24];
    for (int i = 0; entry(setting("PROCESSES", ""), i, 0, word, sizeof word); i++) {
        int gpu, instance = -1;
        if (sscanf(word, "%d/%d:%23[^:]:%23s", &gpu, &instance, pid, used) != 4 &&
            sscanf(word, "%d:%23[^:]:%23s", &gpu, pid, used) != 3) abort();
        if (gpu != device->gpu || (device->instance >= 0 && device->instance != instance)) continue;
        if (found < room && out)
            out[found] = (Process){strcmp(pid, "self") ? (unsigned)atoi(pid) : (unsigned)getpid(),
                                   *used == '?' ? ~0ull : strtoull(used, 0, 10) * MIB,
                                   instance < 0 ? ~0u : (unsigned)instance, instance < 0 ? ~0u : 0};
        found++;
    }
    *count = found;
    return found && (found > room || !out) ? INSUFFICIENT_SIZE : SUCCESS;
}
