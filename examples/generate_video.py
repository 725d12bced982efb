"""Continue images or videos with a trained model: the original's base.py and video2world.py, with their flags.

python examples/generate_video.py --ar_model_dir Cosmos-Predict1-4B --input_image_or_video_path clip.mp4
python examples/generate_video.py --prompt "A car turns left." --input_image_or_video_path clip.mp4   # Video2World
python examples/generate_video.py --checkpoint checkpoints/PROJECT/GROUP/NAME --input_image_or_video_path clip.mp4
torchrun --nproc_per_node=N examples/generate_video.py --num_gpus N ...      # the work shared by N GPUs
"""

from cosmos_mcore.inference.main import main
from cosmos_mcore.parallel.command_line import run_command

if __name__ == "__main__":
    run_command(main)
