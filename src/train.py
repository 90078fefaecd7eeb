"""deepspeed src/train.py --deepspeed ds_configs/z2.json, or python src/train.py for one process."""

from gfrnn.training.main import main

if __name__ == "__main__":
    main()
