# The two that matter: `make deploy` and `make test`. GNU make 3.81 or later; nothing here asks.
#
# The environment in .venv is made again only when a lock file or pyproject.toml changed.

FLY_BUILD := .venv/bin/python -m builder_orch
READY := .venv/.ready

.PHONY: help deploy test test-system check bench clean

help: ## show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "%-12s %s\n", $$1, $$2}' Makefile

deploy: ## deploy examples/hello to the platform embedded in this machine
	@workflows/system-packages deploy
	@$(MAKE) --no-print-directory $(READY)
	@examples/prepare
	$(FLY_BUILD) deploy examples/hello --create-app $(DEPLOY_FLAGS) </dev/null

test: ## every check and every test but the long ones; system tests where this machine can run them
	@workflows/system-packages test
	@$(MAKE) --no-print-directory $(READY)
	@examples/prepare || echo "make test: tests that build the examples will be skipped" >&2
	@workflows/check -m 'not long' $(PYTEST_FLAGS)

test-system: ## the tests with a real engine, real WireGuard and namespaces, and all long ones
	@workflows/system-packages test
	@$(MAKE) --no-print-directory $(READY)
	@examples/prepare || echo "make test-system: tests that build the examples will be skipped" >&2
	.venv/bin/python -m pytest -m 'system or long' $(PYTEST_FLAGS) </dev/null

check: $(READY) ## format, lint, types, import contracts and the fast tests
	@workflows/check -m 'not system and not long' $(PYTEST_FLAGS)

bench: $(READY) ## how fast the tunnel and builds are on this machine; takes half an hour
	.venv/bin/python -m bench $(BENCH_FLAGS)
	.venv/bin/python -m bench.builds $(BENCH_BUILD_FLAGS)

clean: ## stop the platform that this checkout started, remove .venv and caches
	@if [ -x .venv/bin/python ]; then \
		$(FLY_BUILD) selfhost stop --started-here </dev/null || \
			echo "make clean: a platform that may run was not stopped" >&2; \
	fi
	rm -rf .venv build dist builder_orch.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache .coverage bench/out
	rm -f examples/hello/busybox examples/multistage/busybox
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock requirements-dev.lock pyproject.toml
	@workflows/environment
	@touch $@
