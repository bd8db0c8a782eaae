"""A vLLM server of this server's own: in an environment of its own, on a socket that nobody else can open."""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from dsv3.paths import ROOT

ENVIRONMENT = ROOT / ".vllm"
"""Made by `make vllm`."""
MODEL = "served"
SETTINGS = {
    "VLLM_MLA_DISABLE": "1",  # its MLA needs a latent of 320, 512 or 576 numbers
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG


class VLLMProcess:
    """Serves the model in the subfolder `MODEL` of a private folder, which it removes in the end."""

    def __init__(
        self, folder: Path, *, length: int, texts: int, dtype: str, threads: int, flags: Sequence[str]
    ) -> None:
        """`length`: longest text, in tokens. `texts`: written at once. `flags`: further ones of vLLM's server."""
        self.folder, self.socket, self.log = folder, folder / "socket", folder / "log"
        command = [
            str(python()), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(self.socket),
            "--model", str(folder / MODEL), "--served-model-name", MODEL, "--dtype", dtype,
            "--max-model-len", str(length), "--max-num-seqs", str(texts), *flags,
        ]  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        path = f"{python().parent}{os.pathsep}{os.environ.get('PATH', '')}"
        settings = kept | SETTINGS | {"OMP_NUM_THREADS": str(threads), "PATH": path}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=settings, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    def client(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None)
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket), limits=limits), base_url="http://vllm")

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises RuntimeError where it ends before, or takes longer."""
        end = time.monotonic() + seconds
        with self.client() as client:
            while time.monotonic() < end:
                self.check()
                try:
                    if client.get("/health", timeout=5).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise RuntimeError(f"vLLM did not answer within {seconds:.0f} s: {self.last_words()}")

    def check(self) -> None:
        """Raises RuntimeError where it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"vLLM has ended with status {self.process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return " ".join((errors or lines or ["it said nothing"])[-1].split())[-300:]

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with suppress(ProcessLookupError):  # its own processes may outlive it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def python() -> Path:
    """Raises ValueError where there is no environment."""
    found = ENVIRONMENT / "bin" / "python"
    if not found.exists():
        raise ValueError(f"engine=vllm: {ENVIRONMENT} holds no vLLM; set it up with: make vllm")
    return found


def private_folder() -> Path:
    """A new one that only this user can open."""
    return Path(tempfile.mkdtemp(prefix="dsv3-vllm-"))


def end_with_parent() -> None:
    """Called in the new process: it is ended when this one is, however that ends."""
    ctypes.CDLL(None).prctl(SIGNAL_AT_PARENTS_DEATH, signal.SIGTERM)
