"""Running commands; and how child processes are started and ended."""

from __future__ import annotations

import contextlib
import inspect
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CalledProcessError
from typing import Any, get_type_hints

import pytest
from twisted.internet.defer import CancelledError

from tests.coro.support import STYLES, run_for_real
from tests.support import open_descriptors
from twisted_rtsig.coro import (
    Event,
    OutputLimitExceeded,
    Process,
    StreamError,
    open_process,
    run_process,
    sleep,
    spawn,
    timeout,
)
from twisted_rtsig.coro.commands import ProcessOptions
from twisted_rtsig.engine.processes import ChildProcess

pytestmark = pytest.mark.processes

if sys.platform == "win32":
    pytest.skip("test_windows_processes.py is for Windows", allow_module_level=True)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


class Left(Exception):
    """The error that a block ends with."""


# Prints that it runs, and ignores SIGTERM.  It loops by builtins of the shell, so that
# no process is left over when it is killed.
STUBBORN = "trap '' TERM; echo ready; while :; do read line <&0 || sleep 0.01; done"


async def leave_by_error(process: Process, first: Awaitable[Any]) -> None:
    """Leave the block of a process by an error, after ``first`` has fired."""
    async with process:
        await first
        raise Left


async def until_gone(pid: int) -> None:
    """Wait until a process that is not a child of this process has ended."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            if state_of(pid) == "Z":
                # A zombie counts as ended: in a container init may not reap it.
                return
            await sleep(0.001)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


# Running commands

COMMANDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "output": (shell("echo out; echo err >&2"), {}),
    "status": (shell("echo out; echo err >&2; exit 3"), {}),
    "a signal": (shell("kill -TERM $$"), {}),
    "input": (["cat"], {"input": b"hello"}),
    "empty input": (["cat"], {"input": b""}),
    "much input": (["cat"], {"input": bytes(1 << 20)}),
    "a bytearray": (["cat"], {"input": bytearray(b"hello")}),
    "input that is not read": (["true"], {"input": bytes(1 << 20)}),
    "nothing is read": (["cat"], {"stdin": DEVNULL}),
    "merged": (shell("echo out; echo err >&2; echo out"), {"stderr": STDOUT}),
    "merged in another folder": (
        shell("pwd; echo err >&2"),
        {"stderr": STDOUT, "cwd": "/"},
    ),
    "no output": (shell("echo out; echo err >&2"), {"stdout": DEVNULL}),
    "no errors": (shell("echo out; echo err >&2"), {"stderr": DEVNULL}),
    "nothing": (shell("echo; exit 2"), {"stdout": DEVNULL, "stderr": DEVNULL}),
    "merged with nothing": (
        shell("echo err >&2"),
        {"stdout": DEVNULL, "stderr": STDOUT},
    ),
    "environment": (shell("echo $WORD"), {"env": {"WORD": "hello"}}),
    "folder": (["pwd"], {"cwd": "/"}),
    "no such program": (["no-such-program-anywhere"], {}),
    "no such folder": (["pwd"], {"cwd": "/no/such/folder"}),
    "text": (["cat"], {"input": "ä\r\nb\rc\nd", "text": True}),
    "encoding": (["cat"], {"input": "ä\n", "encoding": "utf-16"}),
    "errors": (["printf", "\\344"], {"encoding": "utf-8", "errors": "replace"}),
    "only errors": (["printf", "a\\344"], {"errors": "ignore"}),
    "not in the encoding": (["printf", "\\344"], {"encoding": "utf-8"}),
    "text without input": (["echo", "a"], {"text": True}),
    "text, and no errors": (["echo", "a"], {"text": True, "stderr": DEVNULL}),
    "bytes for text": (["cat"], {"input": b"a", "text": True}),
    "text for bytes": (["cat"], {"input": "a"}),
    "two inputs": (["cat"], {"input": b"a", "stdin": DEVNULL + 100}),
    "a session": (
        [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"],
        {"start_new_session": True},
    ),
    "umask": (shell("umask"), {"umask": 0o27}),
    "umask of 0": (shell("umask"), {"umask": 0}),
}


def outcome(error: Exception) -> Any:
    if isinstance(error, CalledProcessError):
        return error.cmd, error.returncode, error.stdout, error.stderr
    return type(error), getattr(error, "errno", None)


@pytest.mark.parametrize("check", [False, True])
def test_the_results_are_those_of_subprocess(reactor: Any, check: bool) -> None:
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}

    async def main() -> None:
        for case, (command, options) in COMMANDS.items():
            plain = {"stdout": PIPE, "stderr": PIPE, **options}
            if "input" not in options:
                plain.setdefault("stdin", DEVNULL)
            try:
                done = subprocess.run(command, check=check, **plain)
                expected[case] = (
                    *(done.args, done.returncode, done.stdout, done.stderr),
                )
            except Exception as error:
                expected[case] = outcome(error)
            try:
                done = await run_process(command, check=check, **options)
                assert type(done) is subprocess.CompletedProcess
                found[case] = (*(done.args, done.returncode, done.stdout, done.stderr),)
            except Exception as error:
                found[case] = outcome(error)

    run_for_real(reactor, main)
    # run_process() checks the type of the input; subprocess fails when it uses it.
    assert expected.pop("bytes for text")[0] is AttributeError
    assert found.pop("bytes for text")[0] is TypeError
    assert found == expected
    assert found["text"][2] == "ä\nb\nc\nd"
    assert found["a session"][2] == b"True\n"


@pytest.mark.parametrize("style", STYLES)
def test_run_process_in_every_style(reactor: Any, style: str) -> None:
    got: list[Any] = []

    def start() -> Any:
        yield lambda: run_process(["cat"], input=b"one", reactor=reactor)
        yield lambda: run_process(["false"], reactor=reactor)
        process = open_process(["sleep", "60"], reactor=reactor)
        yield process.stop
        yield process.stop

    async def main() -> None:
        STYLES[style](reactor, start(), got)
        while len(got) < 4:
            await sleep(0.001)

    run_for_real(reactor, main)
    assert got[0].stdout == b"one"
    assert got[1:] == [CalledProcessError, -signal.SIGTERM, -signal.SIGTERM]


def test_bad_arguments_of_a_command(reactor: Any) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stdin": PIPE}, "what to write as input"),
        ({"max_bytes": -1}, "0 is the least"),
        ({"grace": -1}, "0 seconds is the least"),
        ({"grace": float("nan")}, "0 seconds is the least"),
        ({"stdout": STDOUT}, "only stderr"),
        ({"stdin": STDOUT}, "only stderr"),
        ({"start_new_session": True, "process_group": 0}, "new process group"),
        ({"signal_group": True, "process_group": 1}, "other members"),
        ({"user": "no such user"}, "no such user"),
        ({"group": "no such group"}, "no such group"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            run_process(["true"], reactor=reactor, **options)
    bad: list[dict[str, Any]] = [{"stdout": 9999}, {"pass_fds": [9999]}]
    for options in bad:
        with pytest.raises(OSError, match="Bad file descriptor"):
            run_process(["true"], reactor=reactor, **options)
    with pytest.raises(TypeError, match="no_such_option"):
        run_process(["true"], reactor=reactor, no_such_option=1)  # type: ignore[call-overload]


def test_a_command_that_is_cancelled_is_terminated(
    reactor: Any, tmp_path: Path
) -> None:
    """It has time to clean up, and has ended when the cancellation takes effect."""
    # While it cleans up, the command writes more than a pipe holds.
    script = """
    trap 'head -c 1000000 /dev/zero; rm running; touch cleaned; exit 0' TERM
    touch running
    while :; do sleep 0.01; done
    """

    async def main() -> None:
        running = run_process(shell(script), cwd=tmp_path, grace=60)
        while not (tmp_path / "running").exists():
            await sleep(0.001)
        with pytest.raises(TimeoutError), timeout(0.01):
            await running
        assert [each.name for each in tmp_path.iterdir()] == ["cleaned"]

    run_for_real(reactor, main)


def test_a_command_that_does_not_end_is_killed(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        script = f"echo $$ > {tmp_path}/pid; {STUBBORN}"
        running = run_process(shell(script), stdout=DEVNULL, grace=0.01)
        pid = await number_in(tmp_path / "pid")
        with pytest.raises(TimeoutError), timeout(0.01):
            await running
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run_for_real(reactor, main)


async def number_in(path: Path) -> int:
    while not path.exists() or not path.read_text().endswith("\n"):
        await sleep(0.001)
    return int(path.read_text())


def test_a_second_cancellation_kills_the_command(reactor: Any, tmp_path: Path) -> None:
    async def main() -> None:
        script = f"trap '' TERM; echo $$ > {tmp_path}/pid; {STUBBORN}"
        running = run_process(shell(script), grace=3600)
        pid = await number_in(tmp_path / "pid")
        running.cancel()
        for _ in range(3):
            await sleep(0)
        assert not running.called
        running.cancel()
        with pytest.raises(CancelledError):
            await running
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert reactor.getDelayedCalls() == [] or not any(
            each.getTime() > reactor.seconds() + 1000
            for each in reactor.getDelayedCalls()
        )

    run_for_real(reactor, main)


@pytest.mark.parametrize("redirection", ["", ">&2"])
def test_a_command_that_writes_too_much_is_stopped(
    reactor: Any, redirection: str
) -> None:
    async def main() -> None:
        with pytest.raises(OutputLimitExceeded, match="more than 5 bytes") as caught:
            await run_process(shell(f"exec yes {redirection}"), max_bytes=5)
        error = caught.value
        written = error.stderr if redirection else error.stdout
        assert (written, error.limit) == (b"y\ny\ny", 5)
        done = await run_process(["printf", "12345"], max_bytes=5)
        assert done.stdout == b"12345"
        # The default is a large limit; None is no limit.
        default = inspect.signature(run_process).parameters["max_bytes"].default
        assert default == 1 << 26
        script = f"exec head -c 100000 /dev/zero {redirection}"
        done = await run_process(shell(script), max_bytes=None)
        assert len(done.stderr if redirection else done.stdout) == 100_000

    run_for_real(reactor, main)


def test_a_command_that_ends_before_the_wait(reactor: Any, tmp_path: Path) -> None:
    """So many tasks are ready that the reactor has a turn before all have run."""
    written = tmp_path / "written"

    async def wait_until_written() -> None:
        while not written.exists():
            os.sched_yield()

    async def nothing() -> None:
        pass

    async def main() -> None:
        for script, limit in (
            (f"echo 123456; : > '{written}'; exec sleep 100", 5),
            (f"echo 123456; : > '{written}'", 7),
        ):
            written.unlink(missing_ok=True)
            spawn(wait_until_written)
            for _ in range(2000):
                spawn(nothing)
            running = run_process(shell(script), max_bytes=limit)
            if limit == 5:
                with pytest.raises(OutputLimitExceeded):
                    await running
            else:
                assert (await running).stdout == b"123456\n"

    run_for_real(reactor, main)


def test_a_grandchild_that_keeps_the_output_open(reactor: Any, tmp_path: Path) -> None:
    """run_process() waits for its end, as subprocess does; a cancellation does not."""

    async def main() -> None:
        running = run_process(shell(f"sleep 60 & echo $! > {tmp_path}/pid"))
        pid = await number_in(tmp_path / "pid")
        with pytest.raises(TimeoutError), timeout(0.05):
            await running
        os.kill(pid, signal.SIGKILL)

    run_for_real(reactor, main)


# How processes are started


async def output_of(process: Process) -> bytes:
    output = b""
    while data := await process.stream.read():
        output += data
    return output


def test_files_and_descriptors(reactor: Any, tmp_path: Path) -> None:
    path, errors = tmp_path / "output", tmp_path / "errors"
    (tmp_path / "input").write_bytes(b"hello\n")

    async def main() -> None:
        with (
            (tmp_path / "input").open("rb") as source,
            path.open("wb") as output,
            errors.open("wb") as other,
        ):
            for stderr in (other, other.fileno(), STDOUT):
                async with open_process(
                    shell("cat; echo err >&2"),
                    stdin=source,
                    stdout=output.fileno(),
                    stderr=stderr,
                ) as process:
                    assert await process.wait() == 0
                    with pytest.raises(StreamError, match="output of process"):
                        _ = process.stream
                    with pytest.raises(StreamError, match="error of process"):
                        _ = process.errors
        assert path.read_bytes() == b"hello\nerr\n"
        assert errors.read_bytes() == b"err\nerr\n"

    run_for_real(reactor, main)


def test_a_single_pipe(reactor: Any) -> None:
    async def main() -> None:
        async with open_process(["cat"], stdout=DEVNULL) as process:
            for read in (
                process.stream.read,
                process.stream.peek,
                process.stream.read_line,
                lambda: process.stream.read_exactly(1),
                lambda: process.stream.read_until(b"x"),
            ):
                with pytest.raises(StreamError, match="stdout=PIPE"):
                    await read()
            await process.stream.write(b"x")
            await process.stream.write_eof()
            assert await process.wait() == 0
        async with open_process(["echo", "x"], stdin=DEVNULL) as process:
            with pytest.raises(StreamError, match="stdin=PIPE"):
                await process.stream.write(b"x")
            with pytest.raises(StreamError, match="stdin=PIPE"):
                await process.stream.write_eof()
            assert await output_of(process) == b"x\n"
        assert process.returncode == 0
        async with open_process(["echo", "x"], stderr=STDOUT) as process:
            assert await output_of(process) == b"x\n"
        with pytest.raises(TimeoutError), timeout(0.01):
            async with open_process(["sleep", "60"], stdin=DEVNULL, stdout=DEVNULL):
                await sleep(60)

    run_for_real(reactor, main)


@pytest.mark.parametrize("folder", [None, "/"], ids=["spawned", "forked"])
def test_inherited_streams(reactor: Any, tmp_path: Path, folder: str | None) -> None:
    """With None the child has this process's streams; a closed one stays closed."""
    path = tmp_path / "output"

    async def main() -> None:
        script = "echo out; echo err >&2; cat"
        saved = [os.dup(each) for each in range(3)]
        with path.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                for stderr in (None, STDOUT):
                    async with open_process(
                        *(shell(script),),
                        stdin=DEVNULL,
                        stdout=None,
                        stderr=stderr,
                        cwd=folder,
                    ) as process:
                        assert await process.wait() == 0
            finally:
                for number, each in enumerate(saved):
                    os.dup2(each, number)
                    os.close(each)

    run_for_real(reactor, main)
    assert path.read_bytes() == b"out\nerr\n" * 2


@pytest.mark.parametrize("folder", [None, "/"], ids=["spawned", "forked"])
def test_descriptors_to_pass_on(reactor: Any, folder: str | None) -> None:
    async def main() -> None:
        one, other = os.pipe()
        secret = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(secret, True)
        script = f"echo hello > /dev/fd/{other}; test ! -e /dev/fd/{secret}"
        done = await run_process(shell(script), pass_fds=[other], cwd=folder)
        assert os.read(one, 100) == b"hello\n"
        assert done.returncode == 0
        assert not os.get_inheritable(other)
        for each in (one, other, secret):
            os.close(each)

    run_for_real(reactor, main)


@pytest.mark.parametrize("folder", [None, "/"], ids=["spawned", "forked"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (False, False)),
        ({"process_group": 0}, (True, False)),
        ({"signal_group": True}, (True, False)),
        ({"start_new_session": True}, (True, True)),
        ({"start_new_session": True, "signal_group": True}, (True, True)),
    ],
)
def test_groups_and_sessions(
    reactor: Any,
    folder: str | None,
    options: dict[str, Any],
    expected: tuple[bool, bool],
) -> None:
    async def main() -> None:
        async with open_process(["cat"], cwd=folder, **options) as process:
            pid = process.pid
            assert pid is not None
            await process.stream.write(b"x\n")
            await process.stream.read_line()
            assert (os.getpgid(pid) == pid, os.getsid(pid) == pid) == expected
            if options.get("process_group") == 0:
                async with open_process(["cat"], process_group=pid) as other:
                    await other.stream.write(b"x\n")
                    await other.stream.read_line()
                    assert os.getpgid(other.pid or 0) == pid

    run_for_real(reactor, main)


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="only root can")
def test_users_and_groups(reactor: Any) -> None:
    nobody = pwd.getpwnam("nobody")

    async def main() -> None:
        for user, group in (("nobody", None), (nobody.pw_uid, nobody.pw_gid)):
            done = await run_process(["id", "-u"], user=user, group=group, cwd="/")
            assert int(done.stdout) == nobody.pw_uid
        done = await run_process(["id", "-g"], group=nobody.pw_gid)
        assert int(done.stdout) == nobody.pw_gid

    run_for_real(reactor, main)


def test_only_root_can_change_the_user(
    reactor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("getuid", "geteuid"):
        monkeypatch.setattr(os, name, lambda: 1000)
    for options in ({"user": 1}, {"group": 1}):
        with pytest.raises(PermissionError, match="only root"):
            open_process(["true"], reactor=reactor, **options)  # type: ignore[arg-type]


def test_a_reactor_with_its_own_spawn_process(reactor: Any) -> None:
    """The reactor's own ``spawnProcess`` is called; an option that it lacks raises."""
    started = []

    class Wrapping(type(reactor)):  # type: ignore[misc]
        def spawnProcess(self, *args: Any, **named: Any) -> Any:
            started.append(named)
            return super().spawnProcess(*args, **named)

    async def main() -> None:
        assert (await run_process(["echo", "x"])).stdout == b"x\n"
        assert len(started) == 1
        with pytest.raises(NotImplementedError, match="merge_errors=True"):
            await run_process(["true"], stderr=STDOUT)

    before = reactor.__class__
    reactor.__class__ = Wrapping
    try:
        run_for_real(reactor, main)
    finally:
        reactor.__class__ = before


def test_no_descriptor_stays_open(reactor: Any) -> None:
    async def main() -> None:
        async def some() -> None:
            with contextlib.suppress(FileNotFoundError):
                await run_process(["./no-such-program"])
            with contextlib.suppress(OSError):
                await run_process(["true"], stdout=DEVNULL, pass_fds=[9999])
            with contextlib.suppress(TimeoutError), timeout(0.001):
                await run_process(["sleep", "60"], stdout=DEVNULL, stderr=STDOUT)
            await run_process(["true"], cwd="/", stdin=DEVNULL)

        await some()
        before = open_descriptors()
        await some()
        while open_descriptors() > before:
            await sleep(0.001)

    run_for_real(reactor, main)


# How processes are ended


def test_a_block_that_raises_terminates_first(reactor: Any, tmp_path: Path) -> None:
    """The process can clean up; output that it writes meanwhile is not read."""
    script = f"""
    trap 'head -c 1000000 /dev/zero; touch {tmp_path}/cleaned; exit 7' TERM
    echo ready
    while :; do sleep 0.01; done
    """

    async def main() -> None:
        process = open_process(shell(script), grace=3600)
        with pytest.raises(Left):
            await leave_by_error(process, process.stream.read_line())
        assert process.returncode == 7
        assert (tmp_path / "cleaned").exists()

    run_for_real(reactor, main)


def test_a_block_that_raises_kills_after_the_grace(reactor: Any) -> None:
    async def main() -> None:
        process = open_process(shell(STUBBORN), grace=0.01)
        with pytest.raises(Left):
            await leave_by_error(process, process.stream.read_line())
        assert process.returncode == -signal.SIGKILL

        async def block() -> None:
            async with open_process(shell(STUBBORN), grace=3600) as process:
                processes.append(process)
                await process.stream.read_line()
                ready.set()
                await sleep(3600)

        processes: list[Process] = []
        for twice in (True, False):
            ready = Event()
            task = spawn(block)
            await ready.wait()
            task.cancel()
            await sleep(0.01)
            assert not task.done
            if twice:
                # A second cancellation kills at once.
                task.cancel()
            else:
                processes[-1].stop(0)
            with pytest.raises(CancelledError):
                await task
            assert processes[-1].returncode == -signal.SIGKILL

    run_for_real(reactor, main)


def test_stop(reactor: Any) -> None:
    async def main() -> None:
        process = open_process(["sleep", "60"])
        assert process.returncode is None
        with pytest.raises(ValueError, match="0 seconds is the least"):
            process.stop(-1)
        stopping = process.stop(3600)
        assert await stopping == process.returncode == -signal.SIGTERM
        assert await process.stop() == -signal.SIGTERM
        for end in (process.terminate, process.kill):
            with pytest.raises(ProcessLookupError):
                end()
        # The process is killed even if the waits for it are cancelled.
        process = open_process(shell(STUBBORN))
        await process.stream.read_line()
        process.stop(3600).cancel()
        process.stop(0.01).cancel()
        process.stop(3600).cancel()
        assert await process.wait() == -signal.SIGKILL
        process = open_process(["sleep", "60"])
        assert await process.stop(0) == -signal.SIGKILL

    run_for_real(reactor, main)
    assert not any(each.getTime() > reactor.seconds() + 60 for each in calls(reactor))


def calls(reactor: Any) -> list[Any]:
    return list(reactor.getDelayedCalls())


def test_signals_by_number_and_name(reactor: Any) -> None:
    async def main() -> None:
        for name in ("USR1", "SIGUSR1", signal.SIGUSR1, int(signal.SIGUSR1)):
            async with open_process(["cat"]) as process:
                await process.stream.write(b"x\n")
                await process.stream.read_line()
                process.send_signal(name)
                assert await process.wait() == -signal.SIGUSR1
        async with open_process(["cat"]) as process:
            with pytest.raises(ValueError, match="no such signal"):
                process.send_signal("NO")

    run_for_real(reactor, main)


@pytest.mark.parametrize("session", [False, True], ids=["group", "session"])
def test_signals_reach_the_whole_process_group(
    reactor: Any, session: bool, tmp_path: Path
) -> None:
    # The child in the background ignores SIGTERM, and outlives its parent.
    script = f"(trap '' TERM; {STUBBORN}) & echo $! > {tmp_path}/pid; sleep 60"

    async def main() -> None:
        path = tmp_path / "pid"
        process = open_process(
            shell(script), signal_group=True, start_new_session=session
        )
        with pytest.raises(Left):
            await leave_by_error(process, number_in(path))
        await until_gone(await number_in(path))
        path.unlink()
        # Without signal_group the child in the background lives on.
        process = open_process(
            shell(f"sleep 60 & echo $! > {path}; sleep 60"), start_new_session=session
        )
        with pytest.raises(Left):
            await leave_by_error(process, number_in(path))
        os.kill(await number_in(path), signal.SIGKILL)
        path.unlink()
        running = run_process(shell(script), signal_group=True, cwd="/")
        pid = await number_in(path)
        running.cancel()
        with pytest.raises(CancelledError):
            await running
        await until_gone(pid)

    run_for_real(reactor, main)


@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("session", [False, True], ids=["", "session"])
def test_a_signal_sent_before_exec_is_not_lost(
    reactor: Any, group: bool, session: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it runs its program, a forked child has the handlers of this process."""
    stay, go = os.pipe()
    execute = ChildProcess._execChild

    def wait_first(self: Any, *args: Any) -> None:
        # By now the child has closed all descriptors but its standard streams.
        os.read(0, 1)
        execute(self, *args)

    monkeypatch.setattr(ChildProcess, "_execChild", wait_first)

    async def main() -> None:
        process = open_process(
            ["sleep", "60"],
            cwd="/",
            stdin=stay,
            start_new_session=session,
            signal_group=group,
        )
        process.terminate()
        os.write(go, b"x")
        assert await process.wait() == -signal.SIGTERM

    # run_for_real() gives this process a handler, as a reactor that handles signals.
    run_for_real(reactor, main)
    os.close(stay)
    os.close(go)


def test_the_signal_mask_of_this_thread_is_restored(reactor: Any) -> None:
    async def main() -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        done = await run_process(["grep", "SigBlk", "/proc/self/status"], cwd="/")
        assert int(done.stdout.split()[1], 16) == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    run_for_real(reactor, main)


# The options of both functions


def test_the_options_that_run_process_passes_on_are_those_of_open_process() -> None:
    options = get_type_hints(open_process)
    del options["command"], options["return"]
    passed_on = get_type_hints(ProcessOptions)
    by_name = set(inspect.signature(run_process).parameters)
    assert passed_on.keys() | by_name >= options.keys()
    for name, type_of_option in passed_on.items():
        assert options[name] == type_of_option, name
