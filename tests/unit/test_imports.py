import gc

from qwen3next_train.imports import imported_to_stay


def test_no_garbage_is_looked_for_until_all_is_imported() -> None:
    before = gc.get_freeze_count()
    try:
        with imported_to_stay():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
