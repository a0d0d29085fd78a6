"""Train a flow in one process, or sharded over several by FSDP2; the same script, and the same losses.

python notebooks/distributed.py
torchrun --nproc-per-node 2 notebooks/distributed.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import invzoo as iz


def subnet() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))


def ring(n: int) -> Tensor:
    angle = 2 * torch.pi * torch.rand(n)
    return torch.stack((angle.cos(), angle.sin()), 1) + 0.1 * torch.randn(n, 2)


def train(steps: int, depth: int, batch: int, device: str, rank: int, world: int) -> None:
    torch.manual_seed(0)  # in all processes: the same parameters, and the same batches
    flow = iz.InvertibleSequential(*(iz.AffineCoupling(subnet(), subnet()) for _ in range(depth))).to(device)

    if world > 1:
        mesh = init_device_mesh(device, (world,))
        for module in (*flow, flow):  # each layer gathers its parameters by itself
            fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(module, "forward_and_log_det")  # FSDP2 watches `forward` alone

    base = torch.distributions.Normal(*torch.tensor([0.0, 1.0], device=device))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(steps):
        x = ring(batch).to(device).chunk(world)[rank]
        z, log_det = flow.forward_and_log_det(x)
        loss = -(base.log_prob(z).sum(1) + log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step}, nats per sample: {loss.item() / world:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a flow on a ring of points.")
    parser.add_argument("--device", default=(torch.accelerator.current_accelerator() or torch.device("cpu")).type)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256, help="samples in a step, in all processes together")
    options = parser.parse_args()

    rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if options.device != "cpu":
        torch.accelerator.set_device_index(local)
    if world > 1:
        dist.init_process_group()
    train(**vars(options), rank=rank, world=world)
    if world > 1:
        dist.barrier()  # else gloo's threads may still let go of tensors as Python ends, and end the process with it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
