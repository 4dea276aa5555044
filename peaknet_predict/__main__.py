"""``python -m peaknet_predict``: the commands, also as a rank that a supervisor started."""

from __future__ import annotations

from peaknet_predict.process.supervise import stay_with_supervisor


def main() -> None:
    """Run the command of this process's command line."""
    stay_with_supervisor()
    # Not before: these imports take seconds, in which the supervisor may be killed.
    from peaknet_predict.cli import run

    run()


if __name__ == "__main__":
    main()
