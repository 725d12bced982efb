"""A page in the browser: upload a video or an image, see the model continue it, take the result along.

python examples/demo_app.py --checkpoint checkpoints/PROJECT/GROUP/NAME      # then open http://127.0.0.1:7860
"""

from cosmos_mcore.inference.web_page import main
from cosmos_mcore.parallel.command_line import run_command

if __name__ == "__main__":
    run_command(main)
