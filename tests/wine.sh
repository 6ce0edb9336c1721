#!/usr/bin/env bash
# Runs a real Windows Python, in this folder, under Wine:
#
#   tests/wine.sh ARGUMENT...      python.exe with these arguments.
#   tests/wine.sh --installed      Says whether that would install nothing first.
#
# The first run installs what it needs; on a Debian or Ubuntu of x86-64 that
# takes two minutes.  Wine and a cross compiler come from the distribution (1 GB);
# everything else goes to the folder ${WINE_PYTHON:-~/.cache/twisted-rtsig/wine}
# (1 GB), which can be deleted at any time:
#
# - python311.dll and the extension modules, which python.org has built, out of a
#   wheel that contains them (panda3d's), since pip reaches it wherever it
#   reaches anything,
# - the standard library of any CPython 3.11 on this machine,
# - a launcher and two small libraries, compiled here,
# - Twisted and what the tests need, for Windows.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

root=${WINE_PYTHON:-${XDG_CACHE_HOME:-$HOME/.cache}/twisted-rtsig/wine}
# Change it whenever what is installed changes: then all of it is made anew.
edition=1

bundle=panda3d==1.10.16
bundle_hash=37acfb92655c4226879f95c988e2ef1449a53c54486d6c1ebc00e2772429af82
packages=(
    colorama hypothesis pyhamcrest pyopenssl pytest pytest-randomly pywin32
    service-identity sortedcontainers twisted twisted-iocpsupport
)
wine=/usr/lib/wine/wine64
cross=x86_64-w64-mingw32

say() { printf '%s\n' "$*" >&2; }
fail() { say "wine.sh: $*"; exit 1; }

installed() { [ -x $wine ] && [ "$(cat "$root/edition" 2>/dev/null)" = $edition ]; }

# No windows and no noise.  WINEPREFIX is what Windows keeps on its disk.
export WINEPREFIX=$root/prefix WINEARCH=win64 WINEDEBUG=-all
export WINEDLLOVERRIDES="explorer.exe,mscoree,mshtml="
unset DISPLAY
# Not beside the sources, where another Python keeps its own under the same names.
export PYTHONPYCACHEPREFIX=$root/pycache

# Wine 8 lets no program start whose output is a regular file; hence the cats.
run() { $wine "$root/python/python.exe" "$@" </dev/null 2> >(cat >&2) | cat; }

# Where the standard library of CPython 3.11 is.
find_library() {
    local candidate
    for candidate in "$checkout/.venv/bin/python" python3.11 /usr/bin/python3.11 \
        ~/.pyenv/versions/3.11.*/bin/python; do
        "$candidate" -c 'if 1:
            import sys, sysconfig
            sys.version_info[:2] == (3, 11) or sys.exit(1)
            print(sysconfig.get_path("stdlib"))' 2>/dev/null && return
    done
    return 1
}

find_pip() {
    local candidate
    for candidate in "$checkout/.venv/bin/python" python3.11 python3; do
        if "$candidate" -m pip --version >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_programs() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "Wine runs on x86-64 Linux only."
    if [ -x $wine ] && command -v $cross-gcc unzip >/dev/null; then return; fi
    command -v apt-get >/dev/null ||
        fail "install 64-bit Wine 8 or later ($wine), $cross-gcc and unzip."
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    say "Installing Wine and a cross compiler${sudo:+ (with sudo)}."
    # Old package lists may do, if there is no way to new ones.
    "${sudo[@]}" apt-get update -qq >/dev/null 2>&1 || :
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends wine wine64 gcc-mingw-w64-x86-64 unzip >/dev/null ||
        fail "that failed: install the Debian packages wine, wine64," \
            "gcc-mingw-w64-x86-64 and unzip by hand."
}

install_python() {
    local library pip wheel
    library=$(find_library) ||
        fail "no CPython 3.11 is here, whose standard library it takes."
    pip=$(find_pip) || fail "no Python with pip is here."
    say "Installing a Windows Python in $root."
    rm -rf "$root"/{build,edition,prefix,pycache,python}
    mkdir -p "$root"/build "$root"/python/{DLLs,Lib/site-packages}
    cd "$root"

    "$pip" -m pip download -q --disable-pip-version-check --no-deps -d build \
        --platform win_amd64 --python-version 3.11 --only-binary :all: $bundle
    wheel=$(echo build/*.whl)
    echo "$bundle_hash  $wheel" | sha256sum --quiet -c - ||
        fail "$bundle is not what it was."
    unzip -qj "$wheel" 'deploy_libs/*.pyd' \
        deploy_libs/{libffi-8,libcrypto-3,libssl-3,sqlite3}.dll -d python/DLLs
    unzip -qj "$wheel" deploy_libs/{python311,VCRUNTIME140}.dll -d python
    rm python/DLLs/_tkinter.pyd

    tar -C "$library" -cf - --exclude=__pycache__ --exclude='./config-3*' \
        --exclude=./lib-dynload --exclude=./site-packages --exclude=./dist-packages \
        --exclude=./test --exclude='./_sysconfigdata*' \
        --exclude=./EXTERNALLY-MANAGED . | tar -C python/Lib -xf -

    compile_rest
    "$pip" -m pip install -q --disable-pip-version-check --no-compile \
        --root-user-action=ignore --target python/Lib/site-packages \
        --platform win_amd64 --python-version 3.11 --implementation cp \
        --only-binary :all: "${packages[@]}"
    timeout 300 $wine wineboot -i >/dev/null 2>&1
    timeout 60 $wine winecfg -v win10 >/dev/null 2>&1
    cd "$checkout"
    run -c 'import ctypes, select, socket, ssl, twisted' ||
        fail "the Windows Python does not run."
    rm -r "$root/build"
    echo $edition >"$root/edition"
}

compile_rest() {
    # python.exe, with the manifest by which Windows tells its true version.
    cat >build/python.c <<'C'
#include <windows.h>
#include <stdio.h>
typedef int (*main_function)(int, wchar_t **);
int wmain(int argc, wchar_t **argv) {
    HMODULE library = LoadLibraryW(L"python311.dll");
    main_function run = NULL;
    if (library) run = (main_function)(void *)GetProcAddress(library, "Py_Main");
    if (run) return run(argc, argv);
    fprintf(stderr, "python311.dll: error %lu\n", GetLastError());
    return 120;
}
C
    cat >build/python.manifest <<'XML'
<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<assembly xmlns="urn:schemas-microsoft-com:asm.v1" manifestVersion="1.0">
  <compatibility xmlns="urn:schemas-microsoft-com:compatibility.v1"><application>
    <supportedOS Id="{8e0f7a12-bfb3-4fe8-b9a5-48fd50a15a9a}"/>
  </application></compatibility>
</assembly>
XML
    echo '1 24 "build/python.manifest"' >build/python.rc
    $cross-windres build/python.rc build/resources.o
    $cross-gcc -O2 -municode -static -o python/python.exe build/python.c \
        build/resources.o

    # python3.dll, which hands everything on to python311.dll: for wheels of the
    # stable ABI.
    {
        printf 'LIBRARY python3.dll\nEXPORTS\n'
        $cross-objdump -p python/python311.dll |
            sed -n '/Ordinal\/Name Pointer/,/^$/s/.* \([_A-Za-z][_A-Za-z0-9]*\)$/\1 = python311.\1/p'
    } >build/python3.def
    [ "$(wc -l <build/python3.def)" -gt 1000 ] || fail "python311.dll exports too little."
    echo 'int __stdcall DllMainCRTStartup(void *a, unsigned b, void *c) { return 1; }' \
        >build/python3.c
    $cross-gcc -shared -nostdlib -o python/python3.dll build/python3.c build/python3.def

    # bcryptprimitives.dll, which Wine 8 lacks: for wheels with Rust in them.
    cat >build/random.c <<'C'
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE bytes, SIZE_T count) {
    while (count) {
        ULONG part = count > 0x10000000 ? 0x10000000 : (ULONG)count;
        if (!SystemFunction036(bytes, part)) return FALSE;
        bytes += part;
        count -= part;
    }
    return TRUE;
}
C
    $cross-gcc -O2 -shared -static -o python/bcryptprimitives.dll build/random.c \
        -ladvapi32
}

if [ "${1:-}" = --installed ]; then
    installed
    exit
fi
if ! installed; then
    install_programs
    install_python
fi
run "$@"
