"""``python -m dit_qat VERB``, which is what ``torchrun -m dit_qat VERB`` runs."""

import sys

from dit_qat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
