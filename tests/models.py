"""Runs tests that compare the package with a model of it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests import quick


def run_model(
    machine: type[RuleBasedStateMachine], examples: int, steps: int = 30
) -> None:
    """
    Run a state machine.

    :param examples: how many sequences of steps to run, and a tenth in a quick run.
    :param steps: how many steps a sequence has at most.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=quick.examples(examples),
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
