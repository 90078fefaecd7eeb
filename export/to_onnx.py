"""python export/to_onnx.py RUN --output step.onnx: the step of a trained model for ONNX Runtime."""

from gfrnn_onnx.export import main

if __name__ == "__main__":
    main()
