#!/usr/bin/env python
"""Train an InternVL-X model: arguments, model, data, then Megatron's training loop.

    torchrun --nproc-per-node 2 pretrain_vlm.py --model-preset internvlx_tiny --data meta.json ...

Where things are: the compressors in megatron_internvlx/model/{pvtc,lvtc}.py and data/rvtc.py, what
crosses a pipeline boundary in parallel/boundary.py, the plan of a micro-batch in data/plan.py.
"""

import sys

from megatron_internvlx import usage
from megatron_internvlx.lifecycle import signals
from megatron_internvlx.lifecycle.complaint import complain
from megatron_internvlx.lifecycle.start import check_paths
from megatron_internvlx.paths import check_command_line
from megatron_internvlx.reporting.phases import START


def main() -> int:
    """Train; returns 2 for a mistake of the caller, after one message."""
    if usage.help_requested(sys.argv[1:]):  # before the seconds that torch takes to import
        return usage.print_help()
    signals.block_stop_signals()
    signals.interrupts.arm()
    try:
        check_command_line(sys.argv[1:])
    except ValueError as error:
        return complain(error)
    START.start("imports")
    return train()


def train() -> int:
    """Parse, build the parts of a run, and hand them to Megatron's loop; returns the exit code."""
    # The imports stay in here because the loader's worker processes import this file again. The platform comes
    # before Megatron: without CUDA it prepares torch for it.
    from megatron_internvlx import platform

    platform.setup()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_internvlx import arguments
    from megatron_internvlx.config import settings_from
    from megatron_internvlx.data.rejects import UnusableData
    from megatron_internvlx.lifecycle.continuation import Continuation
    from megatron_internvlx.lifecycle.lock import lock_save
    from megatron_internvlx.lifecycle.origin import check_tile_rule, layout_to_keep, mistake_behind
    from megatron_internvlx.lifecycle.outcome import Outcome
    from megatron_internvlx.lifecycle.saves import GuardedSaves
    from megatron_internvlx.lifecycle.setup import setup_from
    from megatron_internvlx.lifecycle.watch import watch
    from megatron_internvlx.megatron_settings import Execution, Progress
    from megatron_internvlx.parallel.groups import MegatronGroups
    from megatron_internvlx.planning import dryrun
    from megatron_internvlx.precision import Precision
    from megatron_internvlx.reporting.log import TrainingLog
    from megatron_internvlx.reporting.tracking import Trackers
    from megatron_internvlx.training.builder import ModelProvider
    from megatron_internvlx.training.graph import record_steps
    from megatron_internvlx.training.pipeline import boundary_communicator
    from megatron_internvlx.training.provider import DataProvider
    from megatron_internvlx.training.step import ForwardStep
    from megatron_internvlx.training.validation import settle_validation

    START.enter("arguments")
    try:
        args = arguments.parse(made_with=layout_to_keep)
        if (setup := setup_from(args)).settings.dry_run:
            return dryrun.run(args)
        held_out = settle_validation(args)
        check_paths(args)
        check_tile_rule(args)
        lock = lock_save(setup)
        arguments.default_to_one_rank()
        data = DataProvider(args, held_out)
    except ValueError as error:
        return complain(error)
    stop, trackers, step = signals.StopSignals(), Trackers(args), ForwardStep()
    log = TrainingLog(args, data, step, trackers, START)
    outcome = Outcome(setup, stop, trackers.close, lock)
    saves = GuardedSaves(setup, outcome.failed, saved=log.saved).install()
    watch(Progress(args), setup, stop, step, saves, outcome.failed)
    record_steps(settings_from(args, Execution), settings_from(args, Precision))
    communicator = boundary_communicator(data)
    START.enter("groups")
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            data,
            ModelType.encoder_or_decoder,
            step,
            Continuation(args, setup, stop, lock).precede(ModelProvider(args, communicator, step.weights)),
            p2p_communicator=communicator,
            pg_collection=MegatronGroups(),
        )
    except UnusableData as error:
        outcome.failed(str(error), quiet=True)
        return complain(error)
    except SystemExit as stopped:  # how Megatron ends before the last step
        return int(stopped.code) if stopped.code else outcome.ended(early=True, unsaved=saves.unsaved)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        mistake = mistake_behind(args, error)
        outcome.crashed(error, mistake)
        if mistake is not None:
            return complain(mistake)
        raise
    log.close()
    return outcome.ended(early=False, unsaved=saves.unsaved)


if __name__ == "__main__":
    sys.exit(main())
