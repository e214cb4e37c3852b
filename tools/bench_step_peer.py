"""PyTorch's side of `bench_step.py`, which starts it; needs torch, nnunetv2 and monai."""

import copy
import functools
import os
import sys

import bench_pair
import torch
from bench_networks import BLOCKS, PRESETS, Preset
from bench_step import distinct, parse
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn


def main() -> None:
    """Serves as the peer."""
    args = parse(sys.argv[1:])
    sys.path[:0] = args.peer_source.split(os.pathsep)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    setup = setup_layers if args.layers else setup_step
    bench_pair.serve(functools.partial(setup, args), device_peak)


def network(preset: Preset, deep_supervision: bool = True) -> nn.Module:
    """The same network, with its authors' layers."""
    if preset.family == "swin":
        from monai.networks.nets import SwinUNETR

        return SwinUNETR(preset.channels, preset.classes, feature_size=preset.features[0])
    if preset.family == "unetr":
        from monai.networks.nets import UNETR

        size = {"img_size": preset.patch, "feature_size": preset.features[0]}
        return UNETR(preset.channels, preset.classes, **size)
    if preset.family in AUTHORS:
        return AUTHORS[preset.family](preset)
    kind, blocks, convolutions = PlainConvUNet, 2, 2
    if preset.family == "resenc":
        kind, blocks, convolutions = ResidualEncoderUNet, BLOCKS, 1
    net = kind(
        preset.channels,
        len(preset.features),
        preset.features,
        nn.Conv3d,
        preset.kernels,
        preset.strides,
        blocks,
        preset.classes,
        convolutions,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )
    net.apply(InitWeights_He(1e-2))
    return net


def cotr(preset: Preset) -> nn.Module:
    """What its trainer makes, without deep supervision."""
    from CoTr.network_architecture.ResTranUnet import ResTranUnet

    if not torch.cuda.is_available():  # it asks for the GPU by name
        torch.Tensor.cuda = lambda self, *_: self
    return ResTranUnet("IN", "LeakyReLU", preset.patch, preset.classes)


def nnformer(preset: Preset) -> nn.Module:
    """What its trainer for brain tumors makes, without deep supervision."""
    from nnformer.network_architecture.nnFormer_tumor import nnFormer

    sizes = {"embedding_dim": preset.features[0], "input_channels": preset.channels}
    sizes |= {"num_classes": preset.classes, "num_heads": [3, 6, 12, 24], "patch_size": [4, 4, 4]}
    return nnFormer(list(preset.patch), **sizes, deep_supervision=False)


AUTHORS = {"cotr": cotr, "nnformer": nnformer}


def setup_step(args) -> tuple[dict, bench_pair.Jobs]:
    """Builds the step as nnU-Net's trainer does, and runs it once."""
    preset = PRESETS[args.preset]
    device, layout = place(args)
    torch.manual_seed(0)
    net = network(preset).to(device, memory_format=layout)
    batch = args.batch or preset.batch
    image = torch.randn(batch, preset.channels, *preset.patch, device=device)
    image = image.contiguous(memory_format=layout)
    whole = torch.randint(0, preset.classes, (batch, 1, *preset.patch), device=device).float()
    targets = coarser(whole, preset)
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss_fn = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    heads = len(preset.features) - 1
    weights = [0.5**i for i in range(heads)]
    if heads > 1:
        weights[-1] = 0.0
    if not preset.heads:
        targets = whole
    else:
        loss_fn = DeepSupervisionWrapper(loss_fn, [w / sum(weights) for w in weights])
    nets = twins(args, preset, net)
    trained = [p for one in nets[: TRAINED[args.objective]] for p in one.parameters()]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    run_nets = [torch.compile(one) if args.device == "gpu" else one for one in nets]
    narrow = args.peer_dtype == "bfloat16"
    kind = "cuda" if args.device == "gpu" else "cpu"

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=narrow):
            loss = TERMS[args.objective](run_nets, image, targets, loss_fn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 12)
        optimizer.step()
        if args.objective == "mean_teacher":
            follow(nets[1], net)
        wait(args)
        return float(loss.detach())

    facts = {"device": name(args), "loss": step()}
    step()
    return facts, {"step": step}


def twins(args, preset: Preset, net: nn.Module) -> list[nn.Module]:
    """The network, and the second one of the objective: drawn anew, or the average of the first."""
    if args.objective == "supervised":
        return [net]
    second = (
        network(preset) if args.objective == "cps" else copy.deepcopy(net).requires_grad_(False)
    )
    return [net, second.to(next(net.parameters()).device)]


def supervised(nets, image: torch.Tensor, targets, loss_fn) -> torch.Tensor:
    """nnU-Net's loss."""
    return loss_fn(nets[0](image), targets)


def cross_pseudo(nets, image: torch.Tensor, targets, loss_fn) -> torch.Tensor:
    """And on unlabeled patches cross entropy with the other network's classes, twice."""
    labeled, free = zip(*(halves(net, image) for net in nets), strict=True)
    guesses = [logits.detach().argmax(1) for logits in free]
    cross = (
        nn.functional.cross_entropy(logits, guess)
        for logits, guess in zip(free, reversed(guesses), strict=True)
    )
    return sum(loss_fn(heads, targets) for heads in labeled) + 0.1 * sum(cross)


def mean_teacher(nets, image: torch.Tensor, targets, loss_fn) -> torch.Tensor:
    """And on unlabeled patches the squared distance of probabilities from the average's."""
    with torch.no_grad():
        answer = nets[1](image.flip(0))[0].softmax(1)
    labeled, free = halves(nets[0], image)
    return loss_fn(labeled, targets) + 0.1 * ((free.softmax(1) - answer) ** 2).mean()


def halves(net: nn.Module, image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """All heads of labeled patches, and the first of as many unlabeled ones, in one pass."""
    heads = net(torch.cat([image, image.flip(0)]))
    return [head[: len(image)] for head in heads], heads[0][len(image) :]


def follow(teacher: nn.Module, student: nn.Module) -> None:
    """The teacher's parameters become the moving average of the student's."""
    with torch.no_grad():
        for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
            average.lerp_(value, 1e-3)


TERMS = {"supervised": supervised, "cps": cross_pseudo, "mean_teacher": mean_teacher}
TRAINED = {"supervised": 1, "cps": 2, "mean_teacher": 1}  # networks that get gradients


def coarser(whole: torch.Tensor, preset: Preset) -> list[torch.Tensor]:
    """Label maps of all heads, made once: nnU-Net's data loader does it, not its step."""
    targets, size = [], preset.patch
    for strides in preset.strides[:-1]:
        size = tuple(n // s for n, s in zip(size, strides, strict=True))
        targets.append(nn.functional.interpolate(whole, size, mode="nearest-exact"))
    return targets


def setup_layers(args) -> tuple[dict, bench_pair.Jobs]:
    """Every distinct convolution without bias, and with its two gradients."""
    preset, jobs = PRESETS[args.preset], {}
    device, layout = place(args)
    dtype = getattr(torch, args.peer_dtype)
    for index, layer in enumerate(distinct(preset)):
        shape = (args.batch or preset.batch, layer.channels, *layer.size)
        image = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
        image.requires_grad_()
        kernel = torch.randn(layer.features, layer.channels, *layer.kernel, device=device)
        kernel = kernel.to(dtype).contiguous(memory_format=layout).requires_grad_()
        conv = functools.partial(
            nn.functional.conv3d, stride=layer.strides, padding=[k // 2 for k in layer.kernel]
        )
        grad = torch.randn_like(conv(image, kernel))
        jobs[f"{index} forward"] = functools.partial(forward, args, conv, image, kernel)
        jobs[f"{index} both"] = functools.partial(both, args, conv, image, kernel, grad)
    for job in jobs.values():
        job()
    return {"device": name(args)}, jobs


def forward(args, conv, image: torch.Tensor, kernel: torch.Tensor) -> None:
    """Forward alone."""
    with torch.no_grad():
        conv(image, kernel)
    wait(args)


def both(args, conv, image: torch.Tensor, kernel: torch.Tensor, grad: torch.Tensor) -> None:
    """Forward and both gradients."""
    torch.autograd.grad(conv(image, kernel), (image, kernel), grad)
    wait(args)


def place(args) -> tuple[torch.device, torch.memory_format]:
    """Device and layout of images and kernels."""
    device = torch.device("cuda" if args.device == "gpu" else "cpu")
    last = args.peer_format == "channels_last"
    return device, torch.channels_last_3d if last else torch.contiguous_format


def name(args) -> str:
    """What runs where."""
    if args.device == "gpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"cpu, torch {torch.__version__}, {threads}"


def wait(args) -> None:
    """Until the device is done."""
    if args.device == "gpu":
        torch.cuda.synchronize()


def device_peak() -> int | None:
    """Bytes on the device, if there is one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
