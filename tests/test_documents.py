"""Documents: what they link to, name and command exists, README stays one page, and tables fit a terminal."""

import importlib
import re
import shlex

import pytest

from gau.experiments.sweep import Program, find_points
from gau.training import config as training_config
from tests.conftest import ROOT

WRITTEN_BY_PROGRAMS = {'tpu_v4_64.md'}
PAGES = [ROOT / 'README.md', ROOT / 'LOG.md', *sorted((ROOT / 'docs').glob('**/*.md'))]
# The log speaks of files and commands as they were.
LOG = [ROOT / 'LOG.md', *sorted((ROOT / 'docs/log').glob('*.md'))]
CURRENT = [page for page in PAGES if page not in LOG]
COMMON_FLAGS = (ROOT / 'gau/cli.py').read_text()


def name(page):
    return str(page.relative_to(ROOT))


def commands(page):
    """Returns the words of every `python FILE ...` in the page's blocks of bash."""
    blocks = re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words[:1] == ['python'] and words[1].endswith('.py')]


def test_readme_is_one_page():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize('page', CURRENT, ids=name)
def test_named_files_exist(page):
    text = page.read_text()
    for path in re.findall(r'`((?:configs|gau|scripts|tests|docs)/[\w./*]+)`', text):
        assert list(ROOT.glob(path.replace('NAME', '*'))), path


@pytest.mark.parametrize('page', CURRENT, ids=name)
def test_commands_have_the_flags_and_fields_that_exist(page):
    for script, *words in commands(page):
        source = (ROOT / script).read_text()
        config = training_config.default_config()
        for word in words:
            if not word.startswith('--'):
                continue
            flag, _, value = word[2:].partition('=')
            if flag == 'config' and value != '...':
                file, _, argument = value.partition(':')
                program = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
                # The run that a command starts from is the reader's.
                config = program.get_config(re.sub(r'\bstart=[^,]*,?', '', argument))
            elif flag.startswith('config.'):
                field = config
                for part in flag.split('.')[1:]:
                    assert part in field, word
                    field = field[part]
            else:
                assert f"'{flag}'" in source or f"'{flag}'" in COMMON_FLAGS, f'{script} {word}'


@pytest.mark.parametrize('page', [page for page in CURRENT if 'sweep.py' in page.read_text()], ids=name)
def test_documented_sweeps_set_nothing_twice(page):
    for script, *words in commands(page):
        flags = dict(word.removeprefix('--').split('=', 1) for word in words if re.match(r'--[\w.]+=', word))
        if script != 'scripts/sweep.py' or flags['config'] == '...':
            continue
        path, _, argument = flags['config'].partition(':')
        for point in find_points(Program(str(ROOT / path), argument), flags['sweep']):
            assert not {f'config.{field}' for field in point.overrides} & flags.keys(), flags
            assert 'is given twice' not in point.error


def test_entries_of_the_log_are_found_by_their_ids():
    # Headings are `## L42 · date · question`; the index of LOG.md says of those elsewhere on which page they are.
    entries = [(number, page) for page in LOG for number in re.findall(r'^## (L\d\d+) · ', page.read_text(), re.M)]
    places = dict(entries)
    assert len(places) == len(entries) >= 66
    index = dict(re.findall(r'^- \[?(L\d\d+)(?:\]\((\S+)\))?, \d+ \w+: ', LOG[0].read_text(), re.M))
    assert {number: name(page) for number, page in entries if page != LOG[0]} == {
        number: page for number, page in index.items() if page
    }
    assert index.keys() == places.keys(), 'every entry has a line in the index of LOG.md'
    # What is said to be in the log is there.
    sources = [path for room in ('gau', 'configs', 'scripts', 'tests') for path in (ROOT / room).rglob('*.py')]
    for path in [*PAGES, *sources]:
        assert set(re.findall(r'\bL[0-7]\d\b(?!_)', path.read_text())) <= places.keys(), path


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_tables_fit_a_terminal(page):
    # Tables of results are made by scripts/report.py and have as many columns as the experiment.
    if page.name not in WRITTEN_BY_PROGRAMS and page.parent.name != 'results':
        rows = [line for line in page.read_text().splitlines() if line.startswith('|')]
        assert [row for row in rows if len(row) > 100] == []
