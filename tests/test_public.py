"""The names a script uses: each is the object it should be, however often and in whatever order it is asked for."""

import subprocess
import sys

import streamaug


def test_every_public_name_stays_what_it_is_once_its_module_is_imported():
    script = (
        "import streamaug as sa\n"
        "names = dict(sa._PUBLIC)\n"
        "first = {name: getattr(sa, name) for name in names}\n"
        "second = {name: getattr(sa, name) for name in names}\n"
        "called = {name: getattr(second[name], '__name__', '') for name in names}\n"
        "modules = [name for name in names if called[name] == f'streamaug.{name}' != names[name]]\n"
        "assert not modules, modules\n"
        "assert first == second\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(streamaug, "Streem")
