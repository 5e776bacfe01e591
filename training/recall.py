"""Trains a model to recall, on generated sequences, measures it on others and saves it ready for the Hub."""

from efficient_transformers.training.tasks.recall import main

if __name__ == "__main__":
    main()
