"""`launch.py plan CONFIG`: what a run will take on given GPUs, before they are paid for.

    Config + Machines --workload_of--> Workload --> parts      seconds of a step by part, at the worst, likely and best rates
                                      --> fit        memory of a GPU and a host, object store, network of a node
                                      --> simulation the run in virtual time, with the real admission and sampler
                                      --> splits     the same GPUs dealt in another way
                                  report <----------'

Nothing here starts anything. All rates are in rates.py, each with its source.
"""
