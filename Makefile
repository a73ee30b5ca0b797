# make build makes ./hamlet; make demo shows it at work. Both need Go, make and sh.

VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS     := -s -w $(if $(VERSION),-X main.version=$(VERSION))
GOBUILD     := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "$(LDFLAGS)"
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
PLATFORMS   := linux/amd64 linux/arm64 linux/arm darwin/arm64
FUZZTIME    ?= 1m
SEED        ?= 1

.PHONY: build demo test race check fuzz sim bench docker-test haproxy-test man release clean

build:
	$(GOBUILD) -o hamlet .

# Three agents on this machine, a handler, a kill. A few seconds.
demo:
	@sh examples/demo.sh

test:
	go test -parallel 8 -timeout 30m ./...

# Simulations run in one goroutine, so the big ones are left out here. One package
# after the other: agents are slow enough with the detector.
race:
	go test -race -p 1 -parallel 8 -timeout 30m -skip '^TestAThousandMembers$$' ./...

check:
	@out=$$(gofmt -l .); if [ -n "$$out" ]; then echo "not formatted:" $$out; exit 1; fi
	go vet ./...
	GOOS=darwin go vet ./...
	go run $(STATICCHECK) ./...
	go mod tidy -diff

# Every fuzz target for FUZZTIME.
fuzz:
	@for f in $$(grep -ho '^func Fuzz[A-Za-z0-9]*' *_test.go | cut -c6-); do \
		echo "== $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x . || exit 1; \
	done

# A big cluster in virtual time, and its figures: make sim N=10000 SEED=7 LOSS=5
sim:
	SIM_N=$(or $(N),1000) SIM_SEED=$(SEED) SIM_LOSS=$(LOSS) go test -count=1 -v -timeout 60m -run '^TestSimulation$$' .

# Real agents, measured; beside another program with Serf's command line if
# PEER names one: make bench N=100 PEER=/usr/local/bin/serf. ROWS chooses among
# the rows that benchParts lists: make bench ROWS='idle|far-.*'
bench:
	BENCH=1 BENCH_N=$(N) BENCH_ROWS='$(ROWS)' PEER=$(PEER) go test -count=1 -v -timeout 60m -run '^TestBench$$' ./test

# Containers: the image and the compose file of examples/docker.
docker-test:
	@sh test/docker.sh

# examples/haproxy with the real HAProxy: how many requests fail when a node goes.
haproxy-test:
	@sh test/haproxy.sh

# A page for man(1), from the text that help shows.
man: build
	@{ echo '.TH HAMLET 1'; echo '.SH NAME'; echo 'hamlet \- makes machines a cluster'; \
	for c in "" $$(./hamlet help | sed -n '/^Commands:/,$$s/^  \([a-z-]*\) .*/\1/p'); do \
		echo ".SH $${c:+hamlet }$${c:-synopsis}" | tr a-z A-Z; echo .nf; ./hamlet help $$c | sed 's/\\/\\e/g; s/-/\\-/g; s/^\([.'"'"']\)/\\\&\1/'; echo .fi; \
	done; } > hamlet.1

# Binaries for all platforms, with checksums, in dist/.
release: man
	@rm -rf dist && mkdir dist && cp hamlet.1 dist/
	@for p in $(PLATFORMS); do \
		GOOS=$${p%/*} GOARCH=$${p#*/} GOARM=6 $(GOBUILD) -o dist/hamlet-$${p%/*}-$${p#*/} . || exit 1; \
	done
	@cd dist && { sha256sum hamlet-* 2>/dev/null || shasum -a 256 hamlet-*; } > SHA256SUMS && cat SHA256SUMS

clean:
	rm -rf hamlet hamlet.1 dist
