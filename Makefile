# make demo: build, then a whole mesh on this machine. make test: everything that must pass before a change lands.

.PHONY: demo test perf conformance soak build

demo: build
	$${CARGO_TARGET_DIR:-target}/release/leyline local demo

build:
	./tests/prepare demo
	cargo build --release --locked -p leyline-cli

test:
	./tests/prepare test
	./tests/all

# Figures, as ratios in one run: see docs/performance.md.
perf: build
	./tests/prepare test
	deploy/images/compile ztunnel
	cargo build --release --locked -p leyline-tests --bins
	OWN_ZTUNNEL=$$(echo $${CARGO_TARGET_DIR:-$$PWD/target}/*-linux-gnu/release/ztunnel) $${CARGO_TARGET_DIR:-target}/release/perf

# The Gateway API's conformance suite on a real cluster; the report goes to docs/conformance.
conformance: build
	./tests/prepare test
	./tests/cluster/build
	cargo build --locked -p leyline-tests --bins
	LEYLINE_BIN=$${CARGO_TARGET_DIR:-target}/release/leyline $${CARGO_TARGET_DIR:-target}/debug/conformance

# An hour of churn, connections by the ten thousand, a quarter of one with parts that are killed, and an hour at the waypoint
# alone: memory and files must return to where they were. MINUTES=5 CONNECTIONS=1000 for less.
soak: build
	./tests/prepare test
	cargo build --release --locked -p leyline-tests --bins
	$${CARGO_TARGET_DIR:-target}/release/soak --minutes $${MINUTES:-60} --connections $${CONNECTIONS:-10000}
	$${CARGO_TARGET_DIR:-target}/release/soak --minutes $$(( ($${MINUTES:-60} + 3) / 4 )) --connections 100 --kill
	$${CARGO_TARGET_DIR:-target}/release/soak --minutes $${MINUTES:-60} --connections 500 --waypoint
