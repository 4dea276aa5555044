"""What ``--help`` shows of the commands whose parsers take seconds to make, and of all of them.

`predict` and `fit` take their options from the classes of a configuration and from Lightning, whose
parsers import torch. Their ``--help-all`` shows everything.
"""

from __future__ import annotations

USAGE = """\
usage: peaknet-predict COMMAND [options]     (COMMAND --help shows a command's options)
       peaknet-predict --version

  run         find the peaks of files: files -> network -> CXI files, on this machine
  predict     find peaks: input queue -> network -> output queue
  feed        push events from files or the simulator into an input queue
  write-cxi   write results from an output queue to CXI files
  fit         train a network, on simulated shots or on files with known peaks
  export      write a checkpoint's network as a weight file for predict
  configs     list the configurations that ship, or copy one
  completion  print the script that completes commands in the shell
  doctor      check installation, GPU, Ray and a configuration, and say what to do

exit codes: 0 done, every event accounted for; 1 could not do it, the log's last line says why;
            2 wrong command line or configuration; 3 ended, but interrupted or incomplete;
            4 every event accounted for, but a process of the run died and others did its work
"""

PREDICT = """\
usage: peaknet-predict predict -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]

Find peaks: input queue -> network -> output queue; on one machine also with its own source and
CXI files. Configurations are merged from left to right, and options come last. Every key of a
configuration is an option; these are the ones that change most.

  -c, --config CONFIG         name of a configuration that ships (`peaknet-predict configs` lists
                              them) or a YAML file:
                                -c demo
                                -c predict -c models/peaknet_small -c topology/one_gpu
  --print_config              show the merged configuration, and run nothing

input
  --data.init_args.queue.name NAME        the input queue
  --data.init_args.queue.spool DIR        keep its events on disk too
  --data.init_args.queue.idle_timeout_s S end after S seconds without an event (foreign queues)
  --data.init_args.address ADDRESS        Ray cluster: auto, local (embedded), or host:port
  --data.init_args.batch_size N           events per batch
  --data.init_args.max_latency_ms MS      send a batch out after MS, although it is not full
  --data.init_args.source CLASS           feed the queue from this run: Hdf5Source, NpzSource,
                                          ImageFileSource, Simulator
  --data.init_args.source.init_args.path  files of the source: a path, a pattern or a list
  --data.init_args.resume true            take the place of a run that died

network
  --model.init_args.net CLASS             PeakNet, LocalSnr, or your own: my_net.Net (the current
                                          folder is searched for it)
  --model.init_args.net.init_args.weights FILE   .safetensors, .pt or .pth, or a name that ships
  --model.init_args.threshold X           higher: fewer peaks; 0: the largest logit decides
  --model.init_args.mask FILE             bad pixels: .npy, .npz, FILE.h5:/DATASET, or a .geom
  --model.init_args.bad_values VALUES     what marks bad pixels: auto, none, or a list
  --model.init_args.saturation COUNTS     pixels from here on are saturated
  --model.init_args.fast false            no fast form of PeakNet

output
  --output.queue.name NAME                the output queue
  --output.directory DIR                  where CXI files go
  --output.min_peaks N                    events with fewer peaks are counted, not written
  --output.balance FILE                   the record of the run: what became of the events

machine
  --trainer.accelerator cpu|gpu|auto      or -c topology/cpu, one_gpu, two_gpus, slurm
  --trainer.devices N                     processes on this machine
  --trainer.precision PRECISION           32-true, bf16-mixed, ...

more
  --data.help CLASS, --model.help CLASS   every option of a class, for example of
                                          peaknet_predict.data.QueueDataModule or
                                          peaknet_predict.module.PeakNetModule
  --help-all                              every option, with those of Lightning's trainer
"""

FIT = """\
usage: peaknet-predict fit -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]

Train a network. Configurations are merged from left to right, and options come last. Every key of
a configuration is an option; these are the ones that change most.

  -c, --config CONFIG         name of a configuration that ships (`peaknet-predict configs` lists
                              them) or a YAML file:
                                -c train -c models/peaknet_small
                                -c models/peaknet_small -c finetune
  --print_config              show the merged configuration, and run nothing

shots
  --data.init_args.batch_size N
  --data.init_args.path FILES             of finetune: CXI files with peak lists
  --data.init_args.seed N

network
  --model.init_args.net.init_args.weights FILE   start from these weights
  --model.init_args.learning_rate X
  --ckpt_path FILE                        go on from a checkpoint of an earlier run

machine and time
  --trainer.max_time DD:HH:MM:SS          the learning rate falls towards this end
  --trainer.max_steps N                   or towards this one
  --trainer.accelerator cpu|gpu|auto      or -c topology/cpu, one_gpu, two_gpus
  --trainer.devices N                     processes on this machine
  --trainer.precision PRECISION           32-true, bf16-mixed, ...
  --trainer.default_root_dir DIR          where curves go

more
  --data.help CLASS, --model.help CLASS   every option of a class, for example of
                                          peaknet_predict.training.simulated_shots.SimulatedShots
  --help-all                              every option, with those of Lightning's trainer
"""
