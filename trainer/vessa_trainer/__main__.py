"""`python -m vessa_trainer` is `vessa-trainer`."""

from vessa_trainer.cli import main

main()
