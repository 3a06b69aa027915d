"""How ranks find each other: a store that listens no wider than it must, and a secret that only they know.

Launchers give every rank the same DSKD_SECRET. The store's keys stand under it, so that a process which found the port
can neither read nor change where the ranks are; and before anything else is exchanged each rank proves over the process
group itself that it knows the secret. Whoever may read the environment of a rank is the same user, or root.
"""

import hashlib
import hmac
import ipaddress
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from dskd.config.errors import UserError

SECRET = "DSKD_SECRET"
WAIT = timedelta(minutes=30)
"""How long ranks wait for each other; the watchdog has a shorter limit where a run sets one."""


def make_store(rank: int, world_size: int) -> Store:
    """The store that MASTER_ADDR and MASTER_PORT name, which rank 0 holds; one rank needs none that listens."""
    if world_size == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = listen(host, port, world_size) if rank == 0 else None
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=WAIT,
        wait_for_workers=False,  # it would count whoever connects
        master_listen_fd=None if listener is None else listener.detach(),
    )
    return PrefixStore(os.environ.get(SECRET, ""), store)


def listen(host: str, port: int, world_size: int) -> socket.socket:
    """A listener on the address that the other ranks connect to, and on no other interface.

    Where a node's own name stands for loopback in its hosts file, the ranks of other nodes see another address than the
    node itself, and it has to listen on all.
    """
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    spread = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size
    if spread and is_loopback(str(address)):
        address = "0.0.0.0"
    family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), port))
    except OSError as error:
        listener.close()
        raise UserError(f"MASTER_PORT: {port} cannot be used on {address}: {error.strerror}") from None
    listener.listen(1024)
    return listener


def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, is this very machine and seen by no other."""
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError:
        return False
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def stay_on_loopback() -> None:
    """On one machine, let gloo and NCCL talk over loopback, unless the user chose an interface."""
    if is_loopback(os.environ.get("MASTER_ADDR", "")):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def prove(rank: int, world_size: int, store: Store, device: torch.device) -> None:
    """Make sure that every member of the process group knows the secret. A collective call.

    Raises `RuntimeError` where one does not.
    """
    secret = os.environ.get(SECRET, "")
    if world_size == 1 or not secret:
        return
    if rank == 0:
        store.set("nonce", os.urandom(32).hex())
    nonce = store.get("nonce")
    own = torch.frombuffer(bytearray(proof(secret, nonce, rank)), dtype=torch.uint8).to(device)
    found = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(found, own)
    for other, tensor in enumerate(found):
        if not hmac.compare_digest(bytes(tensor.tolist()), proof(secret, nonce, other)):
            raise RuntimeError(f"what joined as rank {other} does not know this run's secret")


def proof(secret: str, nonce: bytes, rank: int) -> bytes:
    return hmac.new(secret.encode(), nonce + str(rank).encode(), hashlib.sha256).digest()
