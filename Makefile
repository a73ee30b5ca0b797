# make build makes ./hamlet; make demo shows it at work. Both need Go, make and sh.
# make install copies it to PREFIX, with man pages and completion.

GOBUILD     := CGO_ENABLED=0 go build -trimpath -buildvcs=auto -ldflags "-s -w"
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
PLATFORMS   := linux/amd64 linux/arm64 linux/armv6 linux/386 linux/riscv64 linux/ppc64le linux/s390x \
	darwin/amd64 darwin/arm64 freebsd/amd64
PREFIX      ?= /usr/local
IMAGE       ?= hamlet
FUZZTIME    ?= 1m
SEED        ?= 1
SEEDS       ?= 200

BIN  = $(DESTDIR)$(PREFIX)/bin
MAN  = $(DESTDIR)$(PREFIX)/share/man
BASH = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSH  = $(DESTDIR)$(PREFIX)/share/zsh/site-functions

.PHONY: build demo install uninstall image test race check fuzz sim bench docker-test haproxy-test man release clean
.DELETE_ON_ERROR:

build:
	$(GOBUILD) -o hamlet .

# As install needs it: built, unless it is there and newer than its sources, so
# that "sudo make install" needs no Go.
hamlet: $(filter-out %_test.go,$(wildcard *.go)) docs/commands.txt docs/handlers.md go.mod
	$(GOBUILD) -o hamlet .

install: hamlet
	install -d '$(BIN)' '$(MAN)/man1' '$(MAN)/man7' '$(BASH)' '$(ZSH)'
	install -m 755 hamlet '$(BIN)/hamlet'
	sh docs/generate/man.sh hamlet ./hamlet >'$(MAN)/man1/hamlet.1'
	sh docs/generate/man.sh handlers ./hamlet >'$(MAN)/man7/hamlet-handlers.7'
	sh docs/generate/completion.sh bash ./hamlet >'$(BASH)/hamlet'
	sh docs/generate/completion.sh zsh ./hamlet >'$(ZSH)/_hamlet'
	chmod 644 '$(MAN)/man1/hamlet.1' '$(MAN)/man7/hamlet-handlers.7' '$(BASH)/hamlet' '$(ZSH)/_hamlet'

uninstall:
	rm -f '$(BIN)/hamlet' '$(MAN)/man1/hamlet.1' '$(MAN)/man7/hamlet-handlers.7' '$(BASH)/hamlet' '$(ZSH)/_hamlet'

# A container image of this one file, whatever system it is built on.
image:
	GOOS=linux $(GOBUILD) -o examples/docker/hamlet .
	docker build -q -t $(IMAGE) examples/docker
	@docker image inspect -f 'the image $(IMAGE) has {{.Size}} bytes' $(IMAGE)

# Three agents on this machine, a handler, a kill. A few seconds.
demo:
	@sh examples/demo.sh

test:
	go test -parallel 8 -timeout 30m ./...

# Simulations run in one goroutine, so the big ones are left out here. One package
# after the other: agents are slow enough with the detector.
race:
	go test -race -p 1 -parallel 8 -timeout 30m -skip '^TestSimulationOfAThousandMembers$$|WithAnySeed$$|^TestSeedThatIsLateIsJoined|^TestQueriesInAFlood' ./...

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

# A big cluster in virtual time, and its figures: make sim N=10000 SEED=7 LOSS=5.
# Then the stories in which a seed matters, with SEEDS of them.
sim:
	SIM_N=$(or $(N),1000) SIM_SEED=$(SEED) SIM_LOSS=$(LOSS) go test -count=1 -v -timeout 60m -run '^TestSimulation$$' .
	SIM_SEEDS=$(SEEDS) SIM_SEED=$(SEED) go test -count=1 -timeout 60m -run 'WithAnySeed$$|^TestLineThat|^TestSeedThatIsFar' .

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

# Pages for man(1), from what help says and from docs/handlers.md.
man: hamlet
	@mkdir -p dist
	sh docs/generate/man.sh hamlet ./hamlet >dist/hamlet.1
	sh docs/generate/man.sh handlers ./hamlet >dist/hamlet-handlers.7

# Binaries for all platforms, man pages and completion, with checksums, in dist/.
# The same source and the same Go make the same bytes, wherever that is.
release: build
	@rm -rf dist && mkdir dist
	@for p in $(PLATFORMS); do \
		out=dist/hamlet-$${p%/*}-$${p#*/} arch=$${p#*/}; \
		echo "building $$out"; \
		GOFLAGS= GOOS=$${p%/*} GOARCH=$${arch%v6} GOARM=6 $(GOBUILD) -o $$out . || exit 1; \
	done
	@$(MAKE) -s man
	@sh docs/generate/completion.sh bash ./hamlet >dist/hamlet.bash
	@sh docs/generate/completion.sh zsh ./hamlet >dist/_hamlet
	@cp LICENSE CHANGELOG.md dist/
	@cd dist && files=$$(ls) && { sha256sum $$files 2>/dev/null || shasum -a 256 $$files; } >SHA256SUMS && cat SHA256SUMS

clean:
	rm -rf hamlet dist examples/docker/hamlet
