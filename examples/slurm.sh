#!/bin/bash
# AutoAttack's plan on ImageNet, on one machine with 8 GPUs: sbatch slurm.sh
# Requeued or submitted again, the job goes on where it was. Several machines: docs/scale.md.
#SBATCH --job-name=robustvlm
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=robustvlm-%j.log
set -euo pipefail
source "$HOME/robustvlm/bin/activate"
export OMP_NUM_THREADS=8

# The prompts of all classes are embedded once, before eight processes want them.
srun robustvlm evaluate ViT-L-14/openai --data hf:ILSVRC/imagenet-1k --limit 1 --device cuda

srun torchrun --standalone --nproc-per-node 8 \
  -m robustvlm attack ViT-L-14/openai --data hf:ILSVRC/imagenet-1k --attack standard --eps 4/255 \
  --device cuda --out "$HOME/runs" --name imagenet
