"""A file that is written with replaced.py appears whole, or not at all."""

import os
import stat

import pytest

from replaced import replaced


def test_the_file_appears_at_the_end(tmp_path):
    path, link = tmp_path / 'run.json', tmp_path / 'link.json'
    path.write_text('old')
    link.symlink_to(path)
    with replaced(link) as temporary:
        with open(temporary, 'w') as f:
            f.write('new')
        assert path.read_text() == 'old' and os.path.basename(temporary).startswith('.') and temporary.endswith('.json')
    assert path.read_text() == 'new' and link.is_symlink() and len(os.listdir(tmp_path)) == 2


def test_after_an_error_the_old_file_is_there(tmp_path):
    path = tmp_path / 'run.json'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), replaced(path) as temporary, open(temporary, 'w') as f:
        f.write(str(1 / 0))
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['run.json']
    with pytest.raises(OSError, match=r'no/where\.json cannot be written: No such file'):
        with replaced('no/where.json') as temporary, open(temporary, 'w'):
            pass


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError, match='folder cannot be written: Is a directory'):
        with replaced(tmp_path / 'folder') as temporary, open(temporary, 'w'):
            pass
    assert os.listdir(tmp_path) == ['folder']


def test_the_permissions_are_those_of_a_new_file(tmp_path):
    with replaced(tmp_path / 'a') as temporary, open(temporary, 'w'):
        pass
    (tmp_path / 'b').touch()
    assert stat.filemode((tmp_path / 'a').stat().st_mode) == stat.filemode((tmp_path / 'b').stat().st_mode)
