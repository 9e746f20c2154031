# The commands people would guess. Each is a plain cargo command, for those without just.

# every test that needs no GPU
test:
    cargo xtask test

# the tour
demo:
    cargo run --release --bin ampoule -- demo

# what CI runs
ci:
    bash .ci/run

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo xtask check-deps

docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
