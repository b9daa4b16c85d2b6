"""Plants one defect at a time in a copy of this repository, and runs the test that is there for it.

    python tests/mutations.py [WORD...]     those defects whose name has one of the words

Prints a line of Markdown for each, and ends with 1 where a defect stays unseen. Not a test itself: it takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP, ENGINE, TRAIN, SETUP, NVML, MEMORY, HOST, RECIPE = (
    f"harness/training/{name}.py"
    for name in ("step", "engine", "train", "setup", "nvml", "memory", "host", "recipe")
)
HALT, WATCHDOG, CHECKPOINT = (f"harness/training/{name}.py" for name in ("halt", "watchdog", "checkpoint"))
PLUGINS = "harness/plugins.py"
SELFCHECK, CHECKS = "harness/selfcheck.py", "harness/training/checks.py"
SEARCH, DALI, XRESNET = "cluster/search.py", "loaders/dali.py", "models/networks.py"
SAMPLING, FILES = "loaders/sampling.py", "loaders/files.py"


@dataclass(frozen=True)
class Defect:
    """In `file`, each text is replaced by the next; `test` must fail then."""

    name: str
    file: str
    texts: tuple[tuple[str, str], ...]
    test: str


DEFECTS = (
    Defect("the step reads its loss", STEP, (("loss_sum.detach().double()", "torch.tensor(loss_sum.detach().item())"),),
           "test_engine.py::test_the_lr_drops_inside_a_graph"),
    Defect("the step reads its loss (any variant)", STEP, (("loss_sum.detach().double()", "torch.tensor(loss_sum.detach().item())"),),
           "test_fake_devices.py::test_a_whole_step_needs_no_value_and_one_device[he2015]"),
    Defect("labels are selected by a mask", STEP,
           (("logits.float(), labels, reduction", "logits.float()[labels >= 0], labels[labels >= 0], reduction"),),
           "test_engine.py::test_the_lr_drops_inside_a_graph"),
    Defect("a branch on an activation", XRESNET,
           (("activated = self.activation(x)\n", "activated = self.activation(x) if x.amax() > 0 else x\n"),),
           "test_fake_devices.py::test_forward_on_a_fake_gpu[xresnet]"),
    Defect("a constant on the CPU", XRESNET, (("weight.sigmoid()", "(weight.sigmoid() * torch.ones(()))"),),
           "test_fake_devices.py::test_a_whole_step_needs_no_value_and_one_device[se_mxresnet]"),
    Defect("fp16 computes in bf16", STEP, (("torch.float16}", "torch.bfloat16}"),),
           "test_fake_devices.py::test_a_whole_step_in_half_precision[fp16-he2015]"),
    Defect("a new lr is a new tensor", RECIPE, (('group["lr"].fill_(lr)', 'group["lr"] = torch.tensor(lr)'),),
           "test_engine.py::test_the_lr_drops_inside_a_graph"),
    Defect("momentum is made in the first step", RECIPE, (("    if momentum:\n", "    if False:\n"),),
           "test_engine.py::test_a_captured_run_is_the_eager_one_bit_for_bit"),
    Defect("casts of weights are kept", STEP, (("cache_enabled=False", "cache_enabled=True"),),
           "test_engine.py::test_half_precision_weights_are_not_frozen_in_a_graph"),
    Defect("a graph's inputs are not renewed", ENGINE, (("static.copy_(new, non_blocking=True)", "pass"),),
           "test_engine.py::test_a_captured_run_is_the_eager_one_bit_for_bit"),
    Defect("warm-up leaves its trace", ENGINE, (("with restoring():", "with nullcontext():"),),
           "test_engine.py::test_a_captured_run_is_the_eager_one_bit_for_bit"),
    Defect("a shape is captured during an epoch", ENGINE,
           (("            return self.function(*inputs)\n        graph, own", "            if not self._graphs:\n                return self.function(*inputs)\n            self.prepare(*inputs)\n        graph, own"),
            ("for inputs in calls:", "for inputs in calls[:1]:")),
           "test_random_failures.py::test_undisturbed_ranks_replay_graphs_and_give_eagers_figures"),
    Defect("each rank chooses its engine", ENGINE, (("enumerate(gather(reason))", "enumerate([reason])"),),
           "test_random_failures.py::test_one_rank_fails_and_both_go_on_alike[41]"),
    Defect("graphs outlive a run that ends well", SETUP, (("            stack.callback(each.reset)\n", "            pass\n"),),
           "test_lifetime.py::test_nothing_outlives_a_run[graphs-ends well]"),
    Defect("graphs outlive a run that raises", TRAIN,
           (('stack.enter_context(training(run, worker, folder / "stacks"))', "(unclosed := training(run)).__enter__()"),),
           "test_lifetime.py::test_nothing_outlives_a_run[graphs-raises]"),
    Defect("mixup begins anew within an epoch", TRAIN, (("        draw_mix(count, recipe.mixup, random)\n", "        pass\n"),),
           "test_halt.py::test_stopped_at_any_step_the_run_is_the_same[3]"),
    Defect("the sums of a part are lost", TRAIN, (("new_tensor(before_it)", "new_tensor([0.0, 0.0])"),),
           "test_halt.py::test_stopped_at_any_step_the_run_is_the_same[3]"),
    Defect("a rank stops at a step of its own", HALT, (("self._most = max(int(self._store.get(rank)) for rank in self._ranks)", "self._most = self._begun"),),
           "test_halt.py::test_two_ranks_stop_before_the_same_step"),
    Defect("a rank that has stopped is not told from one that waits", WATCHDOG,
           (("if seen < since and rank != self._rank", "if False"),),
           "test_watchdog.py::test_who_hangs_is_named_with_what_each_rank_waits_for"),
    Defect("loaders outlive a run that is interrupted", TRAIN,
           (("stack.enter_context(closing(prepare(spec, worker, paths, warn)))", "prepare(spec, worker, paths, warn)"),),
           "test_lifetime.py::test_nothing_outlives_a_run[loaders-is interrupted]"),
    Defect("a closed loader keeps its pipeline", DALI, (("self._pipeline = self._pixels = None", "self._pixels = None"),),
           "test_lifetime.py::test_nothing_outlives_a_run[pipelines-raises]"),
    Defect("DALI shares memory that it is fed", DALI, (("no_copy=False", "no_copy=True"),),
           "test_loaders.py::test_dali_shares_no_memory_that_it_is_fed"),
    Defect("NVML without a session", NVML, (("    pynvml.nvmlInit()\n", ""),),
           "test_gpu_readings.py::test_joules_of_an_epoch_and_of_a_node"),
    Defect("a session is left open", NVML, (("        nvml.nvmlShutdown()\n", "        pass\n"),),
           "test_gpu_readings.py::test_gpus_are_counted_and_the_session_is_closed"),
    Defect("NVML's index taken for CUDA's", NVML, (('for name in (*named, f"GPU-{uuid}", f"MIG-{uuid}"):', "for name in (str(index),):"),),
           "test_gpu_readings.py::test_the_gpu_is_the_one_that_cuda_computes_on"),
    Defect("a MIG instance's UUID without its prefix", NVML, (('(*named, f"GPU-{uuid}", f"MIG-{uuid}")', '(f"GPU-{uuid}",)'),),
           "test_gpu_readings.py::test_a_mig_instance_is_read_by_itself"),
    Defect("another process's memory taken for ours", NVML, (("(processes or {}).get(os.getpid())", "next(iter((processes or {}).values()), None)"),),
           "test_gpu_readings.py::test_memory_of_this_process_or_the_reason"),
    Defect("only NVML's own errors are caught", NVML,
           (("        except Exception as error:\n            self._reasons[figure]",
             "        except self._nvml.NVMLError as error:\n            self._reasons[figure]"),),
           "test_gpu_readings.py::test_an_old_library_lacks_functions"),
    Defect("a counter that went back is believed", HOST, ((" and after > before", ""),),
           "test_gpu_readings.py::test_a_counter_that_does_not_count_gives_no_energy"),
    Defect("a throttled GPU is believed", NVML, (("SLOWDOWN = 0x08 | 0x20 | 0x40 | 0x80", "SLOWDOWN = 0x20"),),
           "test_gpu_readings.py::test_what_interferes_with_an_epoch"),
    Defect("what a process held before is others'", MEMORY, (("existed = torch._C._cuda_hasPrimaryContext(index)", "existed = False"),),
           "test_gpu_readings.py::test_the_context_of_a_second_run"),
    Defect("two ways to say TF32, mixed", STEP,
           (('torch.backends.cudnn.allow_tf32 = precision == "tf32"',
             'torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"'),),
           "test_precision_flags.py::test_every_flag_can_be_read_and_says_what_was_asked"),
    Defect("TF32 stays on", STEP,
           (('torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"', 'torch.backends.cuda.matmul.allow_tf32 |= precision == "tf32"'),),
           "test_precision_flags.py::test_nothing_is_left_of_the_precision_before"),
    Defect("a benchmark sets its precision once", "benchmarks/speed.py", (("            set_precision(self.precision)", "            self.seconds or set_precision(self.precision)"),),
           "test_precision_flags.py::test_each_way_of_the_speed_benchmark_has_its_own_flags_in_every_round"),
    Defect("a failed rank keeps its graphs while it leaves", SEARCH,
           (("        result = make_failed(error, attempts=1)\n        _clear_frames(error)\n", "        result = make_failed(error, attempts=1)\n"),),
           "test_search.py::test_a_failed_rank_frees_what_its_frames_hold_before_it_leaves"),
    Defect("a process whose group cannot be destroyed serves on", SEARCH, (("return not thread.is_alive()", "return True"),),
           "test_search.py::test_a_group_that_cannot_be_destroyed_is_given_up_at_a_deadline"),
    Defect("a failed loader is used all the same", SELFCHECK, (("return self.adapt(replace(spec, **instead))", "return spec"),),
           "test_selfcheck.py::test_a_loader_or_an_engine_that_fails_is_replaced"),
    Defect("a machine that trains wrongly is not refused", SELFCHECK, (("check.of is None or (other := self.otherwise(check, spec)) == REFUSE", "(other := check.otherwise) == ''"),),
           "test_selfcheck.py::test_where_nothing_right_is_left_a_run_is_refused"),
    Defect("what is known is checked again", SELFCHECK, (('if name not in known or known[name].state == "failed"]', "if name]"),),
           "test_selfcheck.py::test_what_a_run_rests_on_is_checked_once"),
    Defect("a check holds for any driver", SELFCHECK, (('"driver": driver, ', ""),),
           "test_selfcheck.py::test_gpus_of_this_machine"),
    Defect("each device has 90 seconds", SELFCHECK, (("max(0.0, until - time.monotonic())", "SECONDS"),),
           "test_selfcheck.py::test_ninety_seconds_are_the_most"),
    Defect("what was left out counts as passed", SELFCHECK, (('if r.state != "left out" and', "if r.state and"),),
           "test_selfcheck.py::test_ninety_seconds_are_the_most"),
    Defect("only the process is ended, not what it started", SELFCHECK, (("os.killpg(process.pid, signal.SIGKILL)", "process.kill()"),),
           "test_selfcheck.py::test_a_check_that_hangs_is_ended_with_all_that_it_has_started"),
    Defect("a run does not take the fallback", "harness/commands/run.py", (("adapted = {spec: checked.adapt(spec) for spec in todo}", "adapted = {spec: spec for spec in todo}"),),
           "test_selfcheck.py::test_a_run_takes_what_works_and_its_record_says_so"),
    Defect("limits are not applied", "harness/checklist.py", (("figure <= limit", "figure <= figure"),),
           "test_checks.py::test_a_check_passes_and_sees_each_of_its_faults"),
    Defect("rank 0's result is taken for all", CHECKS, (("worst = gather(run_check(name, bench) if in_time else left_out)", "worst = [run_check(name, bench) if in_time else left_out]"),),
           "test_checks.py::test_two_ranks_pass_and_see_each_of_their_faults"),
    Defect("a rank leaves a check out by its own clock", CHECKS, (("all(gather(time.monotonic() < until))", "time.monotonic() < until"),),
           "test_checks.py::test_two_ranks_pass_and_see_each_of_their_faults"),
    Defect("a probe within the loader's queue", "harness/commands/probe.py", (("max(QUEUE_STEPS, loader.call_steps * (1 + loader.calls_ahead))", "QUEUE_STEPS"),),
           "test_estimate.py::test_a_probe_outlasts_what_the_loader_made_ahead"),
    Defect("records keep a field that was added later", "harness/spec.py", (('whole and "added" not in each.metadata', "whole"),),
           "test_golden.py::test_runs_as_records_have_them"),
    Defect("what a plug-in imports is not in its hash", PLUGINS, (("        for node in ast.walk(", "        for node in () and ast.walk("),),
           "test_plugins.py::test_only_runs_that_use_a_plugin_have_another_key"),
    Defect("each rank draws for itself", RECIPE, (("drawn[self.rank :: self.world_size]", "drawn[: self.images // self.world_size]"),),
           "test_plugin_parts.py::test_draws_are_shared_by_any_number_of_ranks"),
    Defect("AdamW's moments are made in the first step", RECIPE, (("for p in _parameters(groups):", "for p in ():"),),
           "test_plugin_parts.py::test_adamw_is_torchs_and_its_state_is_made_before"),
    Defect("state that a trial of the engine made stays", STEP, (("self.optimizer.state.clear()", "pass"),),
           "test_plugin_parts.py::test_lazily_made_state_is_resumed_exactly"),
    Defect("an optimizer's own counts are not resumed", CHECKPOINT, (('own | kept | {"lr": own["lr"]}', "own"),),
           "test_plugin_parts.py::test_lazily_made_state_is_resumed_exactly"),
    Defect("image files: every epoch has the same boxes", SAMPLING, (("[plan.seed, epoch, 3, image]", "[plan.seed, 3, image]"),),
           "test_files.py::test_a_cut_is_a_function_of_seed_epoch_and_image"),
    Defect("image files: the box is not the plan's", SAMPLING, (("(sizes - box + 1)", "(sizes - box)"),),
           "test_files.py::test_boxes_are_of_random_area_aspect_and_place"),
    Defect("image files: DALI reduces without antialiasing", DALI, (("antialias=True", "antialias=False"),),
           "test_files.py::test_dali_agrees_with_dataloader"),
    Defect("image files: DALI crops elsewhere", DALI, (("make_maps(cuts.offset, sample.flip, self._size[1])", "make_maps(cuts.offset + 1, sample.flip, self._size[1])"),),
           "test_files.py::test_dali_agrees_with_dataloader"),
    Defect("image files: corrupt files have no limit", FILES, (("if len(self.known) > allowed:", "if False:"),),
           "test_files.py::test_corrupt_files_are_counted_and_refused[dataloader]"),
    Defect("image files: the cache forgets contents", "loaders/cache.py", (("split.images.digests if isinstance", "split.images.sizes if isinstance"),),
           "test_files.py::test_fingerprint_is_of_contents_alone"),
)  # fmt: skip


def run_test(tree: Path, test: str) -> str:
    """passed, failed or, where there is no such test, its exit code."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"], cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {0: "passed", 1: "failed"}.get(finished.returncode, f"pytest ends with {finished.returncode}")


def plant(tree: Path, defect: Defect) -> None:
    """Change the copy. Raises ValueError where the text is not there once."""
    path = tree / defect.file
    text = path.read_text()
    for old, new in defect.texts:
        if text.count(old) != 1:
            raise ValueError(f"{defect.name}: {text.count(old)} times in {defect.file}: {old!r}")
        text = text.replace(old, new)
    path.write_text(text)


def main(words: list[str]) -> int:
    """Print the table."""
    chosen = [d for d in DEFECTS if not words or any(word in d.name for word in words)]
    unseen = 0
    print("| defect | file | test | with it |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
        )
        for defect in chosen:
            before = (tree / defect.file).read_text()
            try:
                plant(tree, defect)
                outcome = run_test(tree, defect.test)
            except ValueError as error:
                outcome = str(error)
            (tree / defect.file).write_text(before)
            unseen += outcome != "failed"
            print(f"| {defect.name} | {defect.file} | `{defect.test}` | {outcome} |", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
