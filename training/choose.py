"""Trains a model that picks one of several choices, evaluates it on the test split and saves it ready for the Hub."""

from efficient_transformers.training.tasks.choose import main

if __name__ == "__main__":
    main()
