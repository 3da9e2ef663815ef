# The embedded Kubernetes, the images and the operator on it. With CONTEXT=<kubectl context>, `deploy` and `demo` use that
# cluster of your own instead and touch nothing else; then HELM_ARGS names the images that you have pushed.
CLUSTER := python3 -m dev.cluster
CONTEXT ?=
HELM_ARGS ?=
export CONTEXT HELM_ARGS

.dev/bin/helm: # which the chart's tests need too, on any machine
	@python3 -c 'from dev.cluster import toolchain; toolchain.ensure()'

.PHONY: cluster-up
cluster-up: ## start the embedded Kubernetes (root on Linux); kubeconfig at .dev/kubeconfig
	@$(CLUSTER) up

.PHONY: cluster-down
cluster-down: ## stop it and leave nothing behind but .dev's binaries and images
	@$(CLUSTER) down

.PHONY: clean-cluster
clean-cluster: ## stop it and remove .dev with its binaries and images
	@$(CLUSTER) purge

.PHONY: images
images: ## build the images and load them into the embedded cluster, which they bring up
	@$(CLUSTER) images

.PHONY: deploy
deploy: $(if $(CONTEXT),,images) ## install or upgrade the operator by Helm (CONTEXT=<kubectl context>: on your own cluster)
	@dev/deploy

.PHONY: demo
demo: venv $(if $(CONTEXT),,images) ## the whole story on one machine: cluster, operator, a model, a chat, faults and their repair
	@dev/deploy
	@$(PY) -m dev.demo

.PHONY: live-picture
live-picture: venv .dev/bin/browser ## docs/live.png: the live page while a rank hangs
	@$(PY) -m dev.live_picture
