.PHONY: sim
sim: venv ## 100,000 random schedules each of the operator's ladder, of faults that nobody ends, of the engine's and of the coordinator's, and 1,000 of whole clusters (an hour on two quiet cores; LOCKSTEP_SIM_FIRST=n for other seeds)
	LOCKSTEP_SIM_SCHEDULES=100000 LOCKSTEP_SIM_WORLDS=1000 $(PY) -m pytest -n auto tests/sim/test_coordinator_lives.py \
	  tests/sim/test_operator_ladder.py tests/sim/test_operator_permanent.py tests/sim/test_operator_recovery_sim.py \
	  tests/sim/test_engine_random_faults.py tests/sim/test_engine_lasting_faults.py
