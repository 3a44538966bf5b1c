"""Renders chat templates, as a program of its own: `data/sandbox.py` starts it, talks to it, and stops it in time.

A template is somebody else's code. Here it has jinja2's sandbox, one gibibyte of memory, no files to write and no
processes to start. Requests and replies are JSON after their length in 8 bytes. The environment is that of
transformers' `apply_chat_template`, except for the day: `strftime_now` tells the one that the request names.
"""

import datetime
import functools
import json
import resource
import struct
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MEMORY = 1 << 30  # bytes of address space
MOST_CHARACTERS = 1 << 24  # of one rendering


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what lies between them is said by the assistant."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller):
        text = caller()
        self.environment.spans.append([self.environment.written, self.environment.written + len(text)])
        return text


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, which lead into the interpreter."""

    def __init__(*args, **kwargs):
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        check_name(name)
        super().__setitem__(name, value)


class Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, and nothing else of the class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


def check_name(name):
    """Raise SecurityError for a name that jinja2's sandbox keeps from templates."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def stop(message):
    """What a template's `raise_exception(message)` does."""
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """jinja2's own `tojson` escapes characters of HTML, which no chat template wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment():
    """The sandbox that every template is compiled in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    del environment.filters["random"], environment.globals["lipsum"]  # ids must not vary from run to run
    environment.globals |= {
        "raise_exception": stop,
        "strftime_now": lambda form: environment.today.strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


ENVIRONMENT = make_environment()
TEMPLATES: list[str] = []  # their texts, in the order in which they came


@functools.lru_cache(64)
def compiled(text):
    """The template; the last ones are remembered."""
    return ENVIRONMENT.from_string(text)


def render(text, variables):
    """[text, spans of the generation tags, null], or [null, null, what went wrong]."""
    try:
        template = compiled(text)
        ENVIRONMENT.spans, ENVIRONMENT.written = [], 0
        pieces = []
        for piece in template.generate(**variables):
            pieces.append(piece)
            ENVIRONMENT.written += len(piece)
            if ENVIRONMENT.written > MOST_CHARACTERS:
                return [None, None, f"it writes more than {MOST_CHARACTERS:,} characters"]
        return ["".join(pieces), ENVIRONMENT.spans, None]
    except MemoryError:
        return [None, None, f"it takes more than {MEMORY:,} bytes of memory"]
    except Exception as error:  # somebody else's template may fail in any way
        return [None, None, f"{error}" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: {error}"]


def answer(request):
    """A Rendering, as `render` gives it, of each view that the request asks for; or a new template is remembered."""
    if "text" in request:
        return TEMPLATES.append(request["text"])
    ENVIRONMENT.today = datetime.datetime.fromisoformat(request["date"])
    messages = request["messages"]
    return [
        render(
            TEMPLATES[request["about"]],
            request["tokens"]
            | {"messages": messages[:end], "tools": request["tools"], "documents": None, "add_generation_prompt": asks},
        )
        for end, asks in request["views"]
    ]


def main():
    """Answer requests until the input ends, within limits on memory, files and processes."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(limit, (most, most))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(8):
        request = json.loads(source.read(*struct.unpack("<Q", head)))
        reply = json.dumps(answer(request)).encode()
        sink.write(struct.pack("<Q", len(reply)) + reply)
        sink.flush()


if __name__ == "__main__":
    main()
