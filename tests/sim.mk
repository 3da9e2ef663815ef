.PHONY: sim
sim: venv ## 100,000 random schedules of the operator's ladder, of faults that nobody ends and of the engine's, and 1,000 of whole clusters (long)
	LOCKSTEP_SIM_SCHEDULES=100000 LOCKSTEP_SIM_WORLDS=1000 $(PY) -m pytest -n auto tests/sim/test_operator_ladder.py \
	  tests/sim/test_operator_permanent.py \
	  tests/sim/test_operator_recovery_sim.py tests/sim/test_engine_random_faults.py tests/sim/test_engine_lasting_faults.py
