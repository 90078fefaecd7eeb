"""python export/serve.py MODEL --port P: serve an exported model over HTTP."""

from gfrnn_onnx.server.main import main

if __name__ == "__main__":
    main()
