"""The checks of distributed training that stand for all others in a usual run, in one start of two processes."""

from collections.abc import Callable

from tests.composition import ddp_checks, fsdp_checks, pipeline_checks

__all__ = ["CHECKS"]

CHECKS: dict[str, Callable[[int], None]] = {
    name: suite.CHECKS[name]
    for suite, name in (
        (ddp_checks, "ddp_plain-stack-invert"),
        (ddp_checks, "ddp_overlaps-invert"),
        (ddp_checks, "ddp_log_det-stack-invert"),
        (fsdp_checks, "fsdp_root_reshard-streams-invert"),
        (fsdp_checks, "fsdp_subnets_reshard-stack-recompute"),
        (fsdp_checks, "fsdp_layers_gathers_no_more_often-invert"),
        (fsdp_checks, "fsdp_by_log_det_layers-stack-invert"),
        (pipeline_checks, "pipeline_ScheduleGPipe-sequential-invert"),
    )
}
