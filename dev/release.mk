REGISTRY ?=
DRY_RUN ?=
UNSIGNED ?=

.PHONY: release
release: venv .dev/bin/helm ## push images and chart, and sign them (REGISTRY=…; UNSIGNED=1: without cosign; DRY_RUN=1: only say what would happen)
	$(PY) -m dev.release --registry "$(REGISTRY)" $(if $(UNSIGNED),--unsigned) $(if $(DRY_RUN),--dry-run)
