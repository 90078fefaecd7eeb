"""python src/study.py plan|run: what a study of scaling would take, and its measurements."""

from gfrnn.scaling.main import main

if __name__ == "__main__":
    main()
