"""Pre-train or post-train a Cosmos autoregressive video model.

torchrun --nproc-per-node N examples/pretrain_cosmos_ar.py conf/NAME.yaml [section.key=value ...]
python examples/pretrain_cosmos_ar.py conf/tiny_cpu.yaml      # starts the processes itself
"""

from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.training.main import main

if __name__ == "__main__":
    run_command(main)
