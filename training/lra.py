"""Trains a classifier on a task of the Long Range Arena, evaluates it and saves it ready for the Hub."""

from efficient_transformers.training.tasks.lra import main

if __name__ == "__main__":
    main()
