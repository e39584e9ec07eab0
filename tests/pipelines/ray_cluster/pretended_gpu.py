"""Makes torch say that there is a GPU: a hook for Ray's worker processes, which all import this module."""


def show_gpu() -> None:
    import torch

    torch.cuda.is_available = lambda: True
