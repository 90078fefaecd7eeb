"""python src/evaluate.py RUN: bits per character of a run."""

from gfrnn.training.evaluate import main

if __name__ == "__main__":
    main()
