"""Make the folder of the zoo from a finished run, write its card again, or check it."""

from efficient_transformers.training.runs.publish import main

if __name__ == "__main__":
    main()
