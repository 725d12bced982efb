"""Continue an image or a video with a trained model.

python examples/generate_video.py --config conf/tiny_cpu.yaml --input_image_or_video_path clip.mp4
torchrun --nproc-per-node N examples/generate_video.py ...      # the model split over N GPUs
"""

from cosmos_mcore.inference.main import main
from cosmos_mcore.parallel.command_line import run_command

if __name__ == "__main__":
    run_command(main)
