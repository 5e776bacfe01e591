"""Train several variants or seeds, one after another."""

from efficient_transformers.training.runs.train_all import main

if __name__ == "__main__":
    main()
