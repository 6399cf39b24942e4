"""The archive that the released voices come in, unpacked beside itself once.

tarfile takes a header of any size, and any number of them, into memory: what it reads is bounded here. Of an
archive only names and bytes are used; owners, rights and links are not.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

from personaplex.errors import CheckpointError
from personaplex.files import LFS_ADVICE, is_lfs_pointer

UNPACKED_LIMIT = 2**30  # bytes; the released voices take a thirtieth
HEADER_LIMIT = 20_000  # reads of a tar block or less: a few for each file

_LARGEST_READ = 2**20  # bytes


def unpack(archive: Path) -> Path:
    """The folder `voices` beside `archive` (a tar.gz), unpacked from it unless it is there already.

    Only the files of its folder `voices` are written, with the rights of any new file. Two processes may do
    this at once: each unpacks into a folder of its own and one of them is moved into place. Raises
    CheckpointError.
    """
    folder = archive.parent / "voices"
    if folder.is_dir():
        return folder
    scratch: Path | None = None
    try:
        if not archive.is_file():
            raise FileNotFoundError(archive)
        if is_lfs_pointer(archive):
            raise CheckpointError(f"{archive.name} {LFS_ADVICE}")
        scratch = Path(tempfile.mkdtemp(dir=archive.parent, prefix=".voices-"))
        _extract(archive, scratch)
        try:
            scratch.chmod(0o755)
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise CheckpointError(
            f"{archive.name} cannot be unpacked beside itself ({type(error).__name__}): fetch it again, or "
            "unpack it elsewhere and give that folder as the voice directory"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _extract(archive: Path, target: Path) -> None:
    """Writes the files of the archive's folder `voices` into `target`.

    Raises TarError when there is none, for links and devices, for names that lead elsewhere, and for more
    than UNPACKED_LIMIT bytes or HEADER_LIMIT headers; OSError and zlib.error.
    """
    found = False
    with gzip.open(archive) as stream, tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts:
                raise tarfile.TarError(f"{member.name!r} leads elsewhere")
            if path.parts[:1] != ("voices",):
                continue
            found = True
            source = tar.extractfile(member) if len(path.parts) == 2 else None
            if source is not None:
                with source, (target / path.name).open("xb") as file:
                    shutil.copyfileobj(source, file)
    if not found:
        raise tarfile.TarError("no folder `voices`")


class _Bounded(io.RawIOBase):
    """The content of a compressed file, of which not too much is read: in all, at once, or as headers."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream
        self._headers = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset > UNPACKED_LIMIT:
            raise tarfile.TarError("it unpacks to too much")
        return self._stream.seek(offset)

    def read(self, size: int = -1) -> bytes:
        self._headers += size <= tarfile.BLOCKSIZE
        if self._headers > HEADER_LIMIT:
            raise tarfile.TarError("it has too many headers")
        if not 0 <= size <= _LARGEST_READ or self.tell() + size > UNPACKED_LIMIT:
            raise tarfile.TarError("it unpacks to too much")
        return self._stream.read(size)
