"""python src/study.py plan|run|report: what a study of scaling would take, its measurements, and what they say."""

from gfrnn.scaling.main import main

if __name__ == "__main__":
    main()
