"""The command `doctor`: what this machine can do, and what to install."""

from pathlib import Path

import click

from dear_batch.log import outcome

EXAMPLES = """
\b
Examples:
  dear-batch doctor
  dear-batch doctor --bundle bundles/mine
  dear-batch doctor --json
"""


@click.command(epilog=EXAMPLES)
@click.option("--bundle", type=click.Path(path_type=Path), help="Say which engine it would get.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of tables.")
def doctor(bundle: Path | None, *, as_json: bool) -> None:
    """Say what this machine has, which engines run on it, and which models fit.

    What is missing comes with the line that installs it. Loads no model and needs no GPU.
    """
    from dear_batch.doctor import examine
    from dear_batch.machine import machine

    facts = machine(thorough=True)
    found = examine(facts, bundle)
    if as_json:
        outcome(found)
        return
    from dear_batch.doctor_view import view
    from dear_batch.show import show

    show(view(facts, found))
