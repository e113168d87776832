"""One run: options, set-up, models, state, optimisation, losses, the files that it leaves."""
