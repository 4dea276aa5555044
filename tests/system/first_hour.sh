#!/usr/bin/env bash
# A stranger's first hour, in an environment of its own: installs the wheel, then everything from a folder
# that is not the repository, without HOME, beside files that are called like modules of ours.
#
#   tests/system/first_hour.sh PYTHON WHEEL CONSTRAINTS FOLDER
#
# PYTHON makes the environment, CONSTRAINTS pins what is installed, FOLDER is empty. Ends with 0 if all
# is as README.md says.
set -euo pipefail
python=$1 wheel=$2 constraints=$3 folder=$4
step() { printf '%s  %s\n' "$(date +%T)" "$1"; }

cd "$folder"
unset HOME PYTHONPATH VIRTUAL_ENV RAY_ADDRESS
export OMP_NUM_THREADS=1 RAY_AUTH_TOKEN_PATH=$folder/token

step "a clean environment"
"$python" -m venv env
source env/bin/activate
python --version
step "torch, then the wheel and what it needs"
pip install -q -c "$constraints" "$(grep '^torch==' "$constraints")"
pip install -q -c "$constraints" "$wheel"

mkdir beamtime && cd beamtime
echo "raise SystemExit('a file of the user has been imported')" | tee callbacks.py configs.py > types.py
printf 'from peaknet_predict.models import LocalSnr\n\n\nclass Net(LocalSnr):\n    pass\n' > my_net.py

step "help and version"
peaknet-predict --version
test "$(peaknet-predict predict --help | wc -l)" -le 80
peaknet-predict --help > /dev/null
peaknet-predict configs | grep -q '^models/peaknet_small'
peaknet-predict configs topology/cpu -o mine.yaml

step "errors are one sentence"
if peaknet-predict predict -c demo --data.init_args.batch_sise 4 2> said; then exit 1; fi
grep -q "ERROR data (peaknet_predict.data.QueueDataModule): Option 'batch_sise' is not accepted" said
test "$(wc -l < said)" -le 3

step "doctor"
peaknet-predict doctor --configs '[demo, mine.yaml]'

step "the demo, with the trained network"
peaknet-predict predict -c demo -c mine.yaml --data.init_args.source.init_args.num_events 6 2>&1 | tee said
grep -q 'received 6 = predicted 6 + refused 0' said
grep -q 'nothing left over' said
if grep -qi 'warning\|nan ' said; then exit 1; fi

step "my files, and my network"
python -P - <<'EOF'
import h5py, numpy as np
from peaknet_predict.sources import Simulator
events = list(Simulator(num_events=4, panels=1, height=160, width=192, seed=5, hit_fraction=1.0).events())
with h5py.File("run42.h5", "w") as file:
    file["/entry_1/data_1/data"] = np.stack([image[0] for _, image, _ in events])
    file["/LCLS/photon_energy_eV"] = [energy for _, _, energy in events]
EOF
peaknet-predict run run42.h5 -o peaks --min-peaks 1
python -P -c "import h5py, glob; assert sum(len(h5py.File(p)['/entry_1/data_1/data']) for p in glob.glob('peaks/*.cxi')) > 0"
peaknet-predict predict -c files -c models/snr --model.init_args.net my_net.Net --print_config | grep -q 'my_net.Net'
step "all is well"
