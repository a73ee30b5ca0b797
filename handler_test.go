package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The test binary is also a static program that is a handler in an image
// without a shell.
func init() {
	if os.Getenv("HANDLER_TEST_ROLE") == "program" {
		fmt.Printf("args %q event %s\n", os.Args[1:], os.Getenv("SERF_EVENT"))
		io.Copy(os.Stdout, os.Stdin)
		os.Exit(0)
	}
}

// ---- helpers

type handlerLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *handlerLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *handlerLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *handlerLog) waitFor(t testing.TB, sub string, times int) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("log:\n%.4000s", l)
		}
	}()
	eventually(t, fmt.Sprintf("%q %d times in the log", sub, times), func() bool {
		return strings.Count(l.String(), sub) >= times
	})
}

// startHandlers starts handlers that end with the test, leaving nothing behind.
func startHandlers(t testing.TB, cfg handlerConfig, specs ...string) (*handlers, *handlerLog) {
	t.Helper()
	logged := &handlerLog{}
	cfg.specs, cfg.log = specs, testLogger(logged)
	if cfg.env == nil {
		cfg.env = extraEnv()
	}
	hs, err := newHandlers(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hs.close() })
	return hs, logged
}

// extraEnv hands files to scripts under names.
func extraEnv(kv ...string) func() []string { return func() []string { return kv } }

func readFile(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

func handlerMember(name string, pairs ...string) Member {
	return Member{Name: name, Addr: netip.MustParseAddrPort("172.17.0.20:7946"), Status: statusAlive, Tags: Tags(strings.Join(pairs, "\x00"))}
}

func joinOf(name string) Event {
	return Event{kind: eventJoin, update: update{Member: handlerMember(name)}}
}
func failOf(name string) Event {
	return Event{kind: eventFailed, update: update{Member: handlerMember(name)}}
}
func userEventOf(name, payload string, ltime uint64, coalesce bool) Event {
	return Event{kind: eventUser, update: update{Name: name, Payload: []byte(payload), LTime: ltime, Coalesce: coalesce}}
}

// firstFields returns the first fields of stdin lines.
func firstFields(s string) []string {
	var ns []string
	for line := range strings.Lines(s) {
		ns = append(ns, strings.Split(strings.TrimSuffix(line, "\n"), "\t")[0])
	}
	return ns
}

func numberedNames(prefix string, from, to int) []string {
	var ns []string
	for i := from; i < to; i++ {
		ns = append(ns, prefix+strconv.Itoa(i))
	}
	return ns
}

type procStat struct {
	pid, pgid int
	state     byte
	comm      string
}

func procStats() []procStat {
	var ps []procStat
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range stats {
		head, rest, ok := strings.Cut(readFile(f), ") ")
		pid, comm, _ := strings.Cut(head, " (")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 3 {
			continue
		}
		p := procStat{state: fields[0][0], comm: comm}
		p.pid, _ = strconv.Atoi(pid)
		p.pgid, _ = strconv.Atoi(fields[2])
		ps = append(ps, p)
	}
	return ps
}

// groupAlive counts the processes of a group that are more than zombies.
func groupAlive(pgid int) (n int) {
	for _, p := range procStats() {
		if p.pgid == pgid && p.state != 'Z' {
			n++
		}
	}
	return n
}

func needProc(t testing.TB) {
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		t.Skip("SKIPPED: no /proc here to look for processes in")
	}
}

// pidIn reads a pid that a script wrote.
func pidIn(t testing.TB, path string) (pid int) {
	t.Helper()
	eventually(t, "a pid in "+filepath.Base(path), func() bool {
		s := readFile(path)
		pid, _ = strconv.Atoi(strings.TrimSpace(s))
		return strings.HasSuffix(s, "\n") && pid > 1
	})
	return pid
}

// killPidsIn ends the processes whose pids a script wrote.
func killPidsIn(t testing.TB, path string) {
	t.Helper()
	for word := range strings.FieldsSeq(readFile(path)) {
		pid, _ := strconv.Atoi(word)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Errorf("child %d did not live on: %v", pid, err)
		}
	}
}

// foundShells returns the shells that scripts meet in the wild.
func foundShells(t *testing.T) (paths []string) {
	for _, name := range []string{"sh", "dash", "bash", "busybox"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Logf("SKIPPED: no %s here", name)
			continue
		}
		if name == "busybox" { // is a shell when it is called sh
			link := filepath.Join(t.TempDir(), "sh")
			if err := os.Symlink(path, link); err != nil {
				t.Fatal(err)
			}
			path = link
		}
		paths = append(paths, path)
	}
	return paths
}

// eachShell runs f with each of them.
func eachShell(t *testing.T, f func(t *testing.T, shell string)) {
	for _, shell := range foundShells(t) {
		t.Run(shell, func(t *testing.T) { f(t, shell) })
	}
}

// installScript writes an executable file through another process: were it
// open for writing here, a fork at the wrong time would make it "text busy".
func installScript(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "handler.sh")
	cmd := exec.Command("/bin/sh", "-c", `cat >"$0" && chmod +x "$0"`, path)
	cmd.Stdin = strings.NewReader(body)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	return path
}

// ---- specs

func TestSpecSaysWhichEventsRunWhichScript(t *testing.T) {
	all := []string{"member-join", "member-leave", "member-failed", "member-update", "member-reap", "user:deploy", "user:other", "query:load"}
	for _, tc := range []struct{ spec, script, events string }{
		{"script", "script", "all"},
		{"./handler.sh a b", "./handler.sh a b", "all"},
		{"*=script", "script", "all"},
		{"member-join=script", "script", "member-join"},
		{"member-leave=script", "script", "member-leave"},
		{"member-failed=script", "script", "member-failed"},
		{"member-update=script", "script", "member-update"},
		{"member-reap=script", "script", "member-reap"},
		{"member-join,member-leave=script", "script", "member-join member-leave"},
		{"member-join,member-join=script", "script", "member-join"},
		{"user=script", "script", "user:deploy user:other"},
		{"user:deploy=script", "script", "user:deploy"},
		{"query=script", "script", "query:load"},
		{"query:load,user=script", "script", "user:deploy user:other query:load"},
		{"query:other=script", "script", ""},
		{"user:deploy,user:other=script", "script", "user:deploy user:other"},
		{"user:deploy,member-failed=script", "script", "member-failed user:deploy"},
		{"member-join,*=script", "script", "all"},
		{"*=A=1 B=2 run", "A=1 B=2 run", "all"},
		{"member-join=run --mode=x | tee", "run --mode=x | tee", "member-join"},
		{"*=member-join", "member-join", "all"},
	} {
		h, err := newHandler(tc.spec, "/bin/sh")
		if err != nil || h.script != tc.script {
			t.Fatalf("%q: %+v, error %v", tc.spec, h, err)
		}
		var got []string
		for _, name := range all {
			kind, user, _ := strings.Cut(name, ":")
			if matches(h.events, eventKind(slices.Index(eventNames[:], kind)), user) {
				got = append(got, name)
			}
		}
		want := strings.Fields(strings.Replace(tc.events, "all", strings.Join(all, " "), 1))
		if !slices.Equal(got, want) {
			t.Errorf("%q matches %q, want %q", tc.spec, got, want)
		}
	}
}

func TestSpecThatIsBadIsAStartUpErrorThatQuotesIt(t *testing.T) {
	for spec, say := range map[string]string{
		"":                           "script is empty",
		"   ":                        "script is empty",
		"member-join=":               "script is empty",
		"*= \t":                      "script is empty",
		"=script":                    `unknown event ""`,
		"member-join,=script":        `unknown event ""`,
		"member-jion=script":         `unknown event "member-jion"`,
		"member-join, user=script":   `unknown event " user"`,
		"Member-Join=script":         `unknown event "Member-Join"`,
		"query:=script":              `unknown event "query:"`,
		"member-join:x=script":       `unknown event "member-join:x"`,
		"*:x=script":                 `unknown event "*:x"`,
		"user:=script":               `unknown event "user:"`,
		"MODE=x ./run":               "*=SCRIPT",
		"./run --mode=x":             "*=SCRIPT",
		"member-join":                "there is no script",
		"member-join,member-failed":  "there is no script",
		"user:deploy":                "there is no script",
		"*":                          "there is no script",
		"member-join;member-left=./": "unknown event",
	} {
		_, err := newHandlers(handlerConfig{specs: []string{"true", spec}})
		if err == nil || !strings.Contains(err.Error(), say) || !strings.Contains(err.Error(), strconv.Quote(spec)) {
			t.Errorf("%q: error %v, want it quoted and %q", spec, err, say)
		}
	}
}

func FuzzHandlerSpec(f *testing.F) {
	for _, s := range []string{"script", "*=script", "member-join,member-leave=script", "user:deploy=./x --a=b", "user:=x", "=", ",", "*", "a | b", "A=1 b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		h, err := newHandler(spec, "/bin/sh")
		if err != nil {
			return
		}
		if strings.TrimSpace(h.script) == "" || !strings.HasSuffix(spec, h.script) || len(h.events) == 0 {
			t.Fatalf("%q: %d events, script %q", spec, len(h.events), h.script)
		}
		for _, ev := range h.events {
			kind, name, named := strings.Cut(ev, ":")
			if k := eventKind(slices.Index(eventNames[:], kind)); ev != "*" && k > eventQuery || named && (name == "" || k < eventUser) {
				t.Fatalf("%q: event %q", spec, ev)
			}
		}
		again, err := newHandler("*="+h.script, "/bin/sh")
		if err != nil || again.script != h.script || again.events[0] != "*" {
			t.Fatalf("*=%q: %+v %v", h.script, again, err)
		}
		if plain, err := newHandler(spec, "/nonexistent/sh"); err == nil && (len(plain.argv) == 0 || strings.ContainsAny(strings.Join(plain.argv, " "), shellSyntax)) {
			t.Fatalf("%q without a shell: %q", spec, plain.argv)
		}
	})
}

// ---- environment and stdin

func TestEnvironmentHasSerfsNames(t *testing.T) {
	self := handlerMember("web1", "a-b.c=1", "role=lb", "été=2", "x_9=it's \"so\"\tlong\n=")
	got := handlerEnv(self, true, "127.0.0.1:7373", "secret")
	want := []string{
		"SERF_SELF_NAME=web1", "SERF_SELF_ROLE=lb", "SERF_SELF_ADDR=172.17.0.20:7946",
		"SERF_RPC_ADDR=127.0.0.1:7373", "SERF_RPC_AUTH=secret", "SERF_SELF_ALONE=1",
		"SERF_TAG_A_B_C=1", "SERF_TAG_ROLE=lb", "SERF_TAG__T_=2", "SERF_TAG_X_9=it's \"so\"\tlong\n=",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestShellGetsEnvironmentAndStdinUnharmed(t *testing.T) {
	t.Setenv("FROM_THE_AGENT", "kept")
	t.Setenv("SERF_EVENT", "inherited")
	t.Setenv("SERF_RPC_AUTH", "inherited")
	eachShell(t, func(t *testing.T, shell string) {
		dir := t.TempDir()
		self := handlerMember("self", "role=lb", "quo te=a 'b' \"c\" $HOME `x` \\ \té\nz")
		cfg := handlerConfig{shell: shell, env: func() []string { return handlerEnv(self, false, "127.0.0.1:1", "") }}
		hs, logged := startHandlers(t, cfg, `*=cd '`+dir+`'; cat >stdin; printf '%s|' "$FROM_THE_AGENT" "$SERF_EVENT" "$SERF_SELF_NAME" `+
			`"$SERF_SELF_ROLE" "$SERF_TAG_ROLE" "$SERF_TAG_QUO_TE" "$SERF_RPC_ADDR" "$SERF_RPC_AUTH" "${SERF_USER_EVENT-unset}" "${SERF_USER_LTIME-unset}" >env; echo done`)

		m := handlerMember("ünï", "aa=1,2", "role=w\teb", "text=it's \"a\"\n\té\\")
		m.Addr = netip.MustParseAddrPort("[2001:db8::7]:7946")
		hs.deliver(Event{kind: eventUpdate, update: update{Member: m}}, nil)
		logged.waitFor(t, "done", 1)
		if got, want := readFile(dir+"/stdin"), "ünï\t2001:db8::7\tw\\teb\taa=1,2,role=w\\teb,text=it's \"a\"\\n\\té\\\n"; got != want {
			t.Errorf("stdin %q\nwant  %q", got, want)
		}
		if got, want := readFile(dir+"/env"), "kept|member-update|self|lb|lb|a 'b' \"c\" $HOME `x` \\ \té\nz|127.0.0.1:1||unset|unset|"; got != want {
			t.Errorf("env %q\nwant %q", got, want)
		}

		hs.deliver(userEventOf("de ploy\x00'", "v1.2\n\té $x", 42, true), nil)
		logged.waitFor(t, "done", 2)
		if got, want := readFile(dir+"/stdin"), "v1.2\n\té $x\n"; got != want {
			t.Errorf("payload %q, want %q", got, want)
		}
		if got, want := readFile(dir+"/env"), "|de ploy'|42|"; !strings.HasSuffix(got, want) || !strings.HasPrefix(got, "kept|user|self|") {
			t.Errorf("env %q, want the end %q", got, want)
		}
	})
}

func TestPayloadEndsInOneNewline(t *testing.T) {
	for payload, want := range map[string]string{"": "", "a": "a\n", "a\n": "a\n", "a\nb": "a\nb\n", "a\n\n": "a\n\n"} {
		shared := append(make([]byte, 0, 64), payload...)
		ev := Event{kind: eventUser, update: update{Payload: shared}}
		if got := stdinFor([]delivery{{ev: ev}}); string(got) != want {
			t.Errorf("%q: %q, want %q", payload, got, want)
		}
		if more := shared[:len(payload)+1]; more[len(payload)] != 0 {
			t.Errorf("%q: the event's own bytes were written to", payload)
		}
	}
}

// The scripts of Serf's documentation: the first handler of its introduction,
// and the load balancer of its demo (with another path and no reload).
func TestSerfDocumentationScriptsRun(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil || bash != "/bin/bash" && readFile("/bin/bash") == "" {
		t.Skip("SKIPPED: no /bin/bash here")
	}
	cfgFile := filepath.Join(t.TempDir(), "haproxy.cfg")
	intro := installScript(t, `#!/bin/bash

echo
echo "New event: ${SERF_EVENT}. Data follows..."
while read line; do
    printf "${line}\n"
done
`)
	balancer := installScript(t, `#!/bin/sh
if [ "x${SERF_SELF_ROLE}" != "xlb" ]; then
    echo "Not an lb. Ignoring member join."
    exit 0
fi

while read line; do
    ROLE=`+"`echo $line | awk '{print \\$3 }'`"+`
    if [ "x${ROLE}" != "xweb" ]; then
        continue
    fi

    echo $line | \
        awk '{ printf "    server %s %s check\n", $1, $2 }' >>$CFG
done
echo reloaded
`)
	hs, logged := startHandlers(t, handlerConfig{env: extraEnv("SERF_SELF_ROLE=lb", "CFG="+cfgFile)}, intro, "member-join="+balancer)
	hs.deliver(Event{kind: eventJoin, update: update{Member: handlerMember("c1fbbfe7c9ea", "role=web")}}, nil)
	logged.waitFor(t, "[DEBUG] Event 'member-join' script output: \nNew event: member-join. Data follows...\nc1fbbfe7c9ea\t172.17.0.20\tweb\trole=web\n", 1)
	logged.waitFor(t, "[DEBUG] Event 'member-join' script output: reloaded\n", 1)
	if got := readFile(cfgFile); got != "    server c1fbbfe7c9ea 172.17.0.20 check\n" {
		t.Errorf("haproxy.cfg: %q", got)
	}
}

// ---- queues

func TestHandlerThatSleepsDelaysNobodyAndCatchesUpInOrder(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := handlerConfig{env: extraEnv("DIR=" + dir)}
	// The sleeper hangs in its first run until somebody writes to the fifo.
	hs, _ := startHandlers(t, cfg,
		`*=[ -e "$DIR/slept" ] || { >"$DIR/slept"; read x <"$DIR/fifo"; }; { echo "run $SERF_EVENT"; cat; } >>"$DIR/sleeper"`,
		`*=cat >>"$DIR/other"`)
	hs.deliver(userEventOf("first", "first", 1, false), nil)
	eventually(t, "the sleeper sleeps", func() bool { return readFile(dir+"/other") != "" })
	began := time.Now()
	for i := range 100 {
		switch {
		case i < 60:
			hs.deliver(userEventOf("u", "u"+strconv.Itoa(i), uint64(i), false), nil)
		case i < 80:
			hs.deliver(joinOf("m"+strconv.Itoa(i)), nil)
		case i < 99:
			hs.deliver(failOf("m"+strconv.Itoa(i-20)), nil)
		default:
			hs.deliver(joinOf("m60"), nil)
		}
	}
	if d := time.Since(began); d > 100*time.Millisecond {
		t.Errorf("100 deliveries took %v", d)
	}
	want := slices.Concat([]string{"first"}, numberedNames("u", 0, 60), numberedNames("m", 60, 80), numberedNames("m", 60, 79), []string{"m60"})
	eventually(t, "the other handler got everything", func() bool { return len(firstFields(readFile(dir+"/other"))) >= len(want) })
	t.Logf("the other handler had 100 events after %v", time.Since(began))
	if got := firstFields(readFile(dir + "/other")); !slices.Equal(got, want) {
		t.Errorf("the other handler got %q", got)
	}
	if s := readFile(dir + "/sleeper"); s != "" {
		t.Fatalf("the sleeper woke too early: %q", s)
	}

	if err := os.WriteFile(fifo, []byte("wake\n"), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the sleeper caught up", func() bool { return strings.Count(readFile(dir+"/sleeper"), "m60") == 3 })
	var runs []string
	for _, n := range firstFields(readFile(dir + "/sleeper")) {
		if strings.HasPrefix(n, "run ") {
			runs = append(runs, n)
		}
	}
	got := slices.DeleteFunc(firstFields(readFile(dir+"/sleeper")), func(n string) bool { return strings.HasPrefix(n, "run ") })
	if !slices.Equal(got, want) {
		t.Errorf("the sleeper got %q", got)
	}
	if wantRuns := append(slices.Repeat([]string{"run user"}, 61), "run member-join", "run member-failed", "run member-join"); !slices.Equal(runs, wantRuns) {
		t.Errorf("the sleeper ran %q", runs)
	}
}

func TestHandlerThatIsSlowRunsAHandfulOfTimesForAThousandJoins(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hs, _ := startHandlers(t, handlerConfig{env: extraEnv("DIR=" + dir)}, `echo run >>"$DIR/runs"; sleep 0.1; cat >>"$DIR/got"`)
	before := runtime.NumGoroutine()
	for i := range 1000 {
		hs.deliver(joinOf("n"+strconv.Itoa(i)), nil)
	}
	if n := runtime.NumGoroutine() - before; n > 40 { // other tests run beside this one
		t.Errorf("%d goroutines more for 1,000 events", n)
	}
	eventually(t, "all joins handled", func() bool { return strings.Count(readFile(dir+"/got"), "\n") >= 1000 })
	if !slices.Equal(firstFields(readFile(dir+"/got")), numberedNames("n", 0, 1000)) {
		t.Error("some are missing, doubled or out of order")
	}
	if runs := strings.Count(readFile(dir+"/runs"), "\n"); runs > 6 {
		t.Errorf("%d runs", runs)
	} else {
		t.Logf("%d runs", runs)
	}
}

func TestHandlerSeesExactlyWhatHappenedInQuickSuccession(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	script := `{ printf "$SERF_EVENT "; cat; } >>"$DIR/`
	hs, _ := startHandlers(t, handlerConfig{env: extraEnv("DIR=" + dir)}, "*="+script+`a"`, "*="+script+`b"`, "member-failed,member-leave="+script+`c"`)
	m := handlerMember("m")
	for _, k := range []eventKind{eventJoin, eventFailed, eventJoin, eventUpdate, eventUpdate, eventLeave, eventReap} {
		hs.deliver(Event{kind: k, update: update{Member: m}}, nil)
	}
	words := func(file string) string {
		return strings.Join(strings.Fields(strings.ReplaceAll(readFile(dir+"/"+file), "172.17.0.20", "")), " ")
	}
	for file, want := range map[string]string{
		"a": "member-join m member-failed m member-join m member-update m m member-leave m member-reap m",
		"b": "member-join m member-failed m member-join m member-update m m member-leave m member-reap m",
		"c": "member-failed m member-leave m",
	} {
		eventually(t, "the last event reached "+file, func() bool { return len(words(file)) >= len(want)-2 })
		// Two updates are one run if they waited together, two if not.
		got := strings.Replace(words(file), "member-update m member-update m", "member-update m m", 1)
		eventually(t, file+" complete: "+got, func() bool {
			got = strings.Replace(words(file), "member-update m member-update m", "member-update m m", 1)
			return got == want
		})
	}
}

// The last is the one that came last, whatever Lamport times say: they order nothing.
func TestHandlerQueueKeepsTheLastOfCoalescingUserEvents(t *testing.T) {
	h, err := newHandler("true", "/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	h.runningSince = time.Now() // in this test
	for _, ev := range []Event{
		userEventOf("deploy", "1", 1, true), joinOf("a"), userEventOf("deploy", "2", 2, false), userEventOf("other", "3", 3, true),
		userEventOf("deploy", "5", 5, true), joinOf("b"), userEventOf("deploy", "4", 4, true), failOf("a"), failOf("b"),
		userEventOf("other", "6", 6, true), joinOf("a"),
	} {
		h.enqueue(delivery{ev: ev})
	}
	var got []string
	for batch := h.take(); batch != nil; batch = h.take() {
		s := batch[0].ev.kind.String()
		for _, d := range batch {
			s += " " + d.ev.Member.Name + string(d.ev.Payload)
		}
		got = append(got, s)
	}
	want := []string{"member-join a", "user 2", "member-join b", "user 4", "member-failed a b", "user 6", "member-join a"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

func TestHandlerQueueThatOverflowsDropsTheOldestAndCountsThem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	hs, logged := startHandlers(t, handlerConfig{env: extraEnv("DIR=" + dir)},
		`[ -e "$DIR/slept" ] || { >"$DIR/slept"; read x <"$DIR/fifo"; }; cat >>"$DIR/got"`)
	hs.deliver(failOf("first"), nil)
	eventually(t, "the handler hangs", func() bool { _, err := os.Stat(dir + "/slept"); return err == nil })
	for i := range queueLimit + 1000 {
		hs.deliver(joinOf("n"+strconv.Itoa(i)), nil)
	}
	logged.waitFor(t, "is behind: 4096 events wait, dropping the oldest", 1)
	os.WriteFile(fifo, []byte("wake\n"), 0)
	eventually(t, "the rest handled", func() bool { return strings.Count(readFile(dir+"/got"), "\n") >= queueLimit+1 })
	if got := firstFields(readFile(dir + "/got")); !slices.Equal(got, append([]string{"first"}, numberedNames("n", 1000, queueLimit+1000)...)) {
		t.Errorf("%d events, from %q to %q", len(got), got[1], got[len(got)-1])
	}
	logged.waitFor(t, "was behind: 1000 events dropped", 1)
	if n := strings.Count(logged.String(), "[WARN]"); n != 2 {
		t.Errorf("%d warnings", n)
	}
}

// ---- runs

// All cases run at the same time: those that ignore TERM live for 5 s.
func TestHandlerTimeoutEndsTheWholeGroupWithTermThenKill(t *testing.T) {
	t.Parallel()
	needProc(t)
	type timeoutCase struct {
		script, status string
		stubborn       bool
		dir            string
		logged         *handlerLog
		began          time.Time
	}
	var cases []*timeoutCase
	for _, shell := range foundShells(t) {
		for _, c := range []timeoutCase{
			{script: `echo $$ >"$DIR/pid"; echo hello; sleep 300 & sleep 300`, status: "terminated"},
			{script: `echo $$ >"$DIR/pid"; echo hello; (sleep 300 & sleep 300) & wait`, status: "terminated"},
			{script: `trap '' TERM; echo $$ >"$DIR/pid"; echo hello; while :; do sleep 1; done`, status: "killed", stubborn: true},
			{script: `echo $$ >"$DIR/pid"; (trap '' TERM; echo hello; while :; do sleep 1; done) & sleep 300`, status: "terminated", stubborn: true},
		} {
			c.dir = t.TempDir()
			hs, logged := startHandlers(t, handlerConfig{shell: shell, timeout: 500 * time.Millisecond, env: extraEnv("DIR=" + c.dir)}, "*="+c.script)
			c.logged, c.began = logged, time.Now()
			hs.deliver(joinOf("a"), nil)
			cases = append(cases, &c)
		}
	}
	for _, c := range cases {
		pgid := pidIn(t, c.dir+"/pid")
		c.logged.waitFor(t, "[WARN]", 1)
		eventually(t, "nothing is left of "+c.script, func() bool { return groupAlive(pgid) == 0 })
		line := regexp.MustCompile(`failed on member-join: timed out, signal: ` + c.status + ` after ([\d.]+m?s): hello\n`).FindStringSubmatch(c.logged.String())
		if line == nil {
			t.Fatalf("%s: log: %s", c.script, c.logged)
		}
		if took, err := time.ParseDuration(line[1]); err != nil || c.stubborn && (took < killAfter || took > killAfter+3*time.Second) {
			t.Errorf("%s: KILL after %v", c.script, took)
		}
	}
}

func TestHandlerWithABackgroundChildDoesNotHoldTheNextEvent(t *testing.T) {
	needProc(t)
	eachShell(t, func(t *testing.T, shell string) {
		for name, child := range map[string]string{"silent": "sleep 300", "printing": "yes"} {
			t.Run(name, func(t *testing.T) {
				dir := t.TempDir()
				hs, logged := startHandlers(t, handlerConfig{shell: shell, env: extraEnv("DIR=" + dir)},
					"*="+child+` & echo $! >>"$DIR/pids"; echo started`)
				began := time.Now()
				for i := range 5 {
					hs.deliver(userEventOf("e", "", uint64(i), false), nil)
				}
				logged.waitFor(t, "script output", 5)
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("5 events took %v", took)
				}
				if name == "silent" {
					killPidsIn(t, dir+"/pids")
				}
				eventually(t, "printing children end by SIGPIPE", func() bool {
					pids := strings.Fields(readFile(dir + "/pids"))
					return !slices.ContainsFunc(procStats(), func(p procStat) bool {
						return p.state != 'Z' && slices.Contains(pids, strconv.Itoa(p.pid))
					})
				})
				if name == "silent" && strings.Count(logged.String(), "script output: started\n") != 5 {
					t.Errorf("log: %s", logged)
				}
			})
		}
	})
}

func TestHandlerOutputWrittenJustBeforeTheEndIsKept(t *testing.T) {
	hs, logged := startHandlers(t, handlerConfig{}, `*=sleep 0.3 & i=0; while [ $i -lt 300 ]; do echo "line $i"; i=$((i+1)); done; echo "last $SERF_USER_LTIME"`)
	for i := range 20 {
		hs.deliver(userEventOf("e", "", uint64(i), false), nil)
		logged.waitFor(t, fmt.Sprintf("line 299\nlast %d\n", i), 1)
	}
}

func TestHandlersThatDoNotReadStdinCostNothing(t *testing.T) {
	dir := t.TempDir()
	for name, script := range map[string]string{
		"ignored": ":", "closed": "exec <&-; sleep 0.05", "one line": "read x", "held by a child": `exec 3<&0; sleep 300 <&3 & echo $! >>"$DIR/pids"`,
	} {
		t.Run(name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			hs, logged := startHandlers(t, handlerConfig{env: extraEnv("DIR=" + dir)}, "*="+script)
			for i := range 3000 { // far more than a pipe takes
				h := (*hs.all.Load())[0]
				h.enqueue(delivery{ev: Event{kind: eventJoin, update: update{Member: handlerMember(strings.Repeat("n", 100) + strconv.Itoa(i))}}})
			}
			hs.deliver(joinOf("last"), nil)
			logged.waitFor(t, "script output", 1)
			hs.deliver(failOf("next"), nil)
			logged.waitFor(t, "'member-failed' script output", 1)
			hs.close()
			eventually(t, "the goroutines end", func() bool { return runtime.NumGoroutine() <= before+1 })
			if strings.Contains(logged.String(), "[WARN]") {
				t.Errorf("log: %s", logged)
			}
			killPidsIn(t, dir+"/pids")
		})
	}
}

func TestHandlerRunsLeaveNoDescriptorsAndGoroutines(t *testing.T) {
	needProc(t)
	count := func() [2]int {
		fds, _ := os.ReadDir("/proc/self/fd")
		return [2]int{len(fds), runtime.NumGoroutine()}
	}
	before := count()
	hs, logged := startHandlers(t, handlerConfig{shell: "/nowhere/sh"}, "/nowhere/missing", "sleep 0", "sh -c")
	(*hs.all.Load())[2].argv = []string{"/bin/sh", "-c", "echo x; exec sleep 0.02 <&- & exit 1"}
	for i := range 50 {
		hs.deliver(userEventOf("e", "payload", uint64(i), false), nil)
	}
	logged.waitFor(t, "[WARN]", 100)
	logged.waitFor(t, "[DEBUG]", 100)
	hs.close()
	eventually(t, "no more descriptors and goroutines than before", func() bool {
		now := count()
		return now[0] <= before[0] && now[1] <= before[1]
	})
}

func TestHandlerOutputThatIsHugeCostsItsLast8KiB(t *testing.T) {
	t.Parallel()
	hs, logged := startHandlers(t, handlerConfig{}, `*=head -c 200000000 /dev/zero; echo the end; echo to stderr >&2`)
	hs.deliver(joinOf("a"), nil)
	logged.waitFor(t, "the end\nto stderr\n", 1)
	if n := len(logged.String()); n > outputKept+100 {
		t.Errorf("logged %d bytes", n)
	}
}

func TestHandlerOutputCaptureKeepsTheFirstAndTheLastBytes(t *testing.T) {
	var all []byte
	var c outputCapture
	for i := range 500 {
		p := bytes.Repeat([]byte{byte('a' + i%26)}, i*i%(3*outputKept))
		if n, err := c.Write(p); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
		all = append(all, p...)
		if want := all[max(0, len(all)-outputKept):]; !bytes.Equal(c.last, want) {
			t.Fatalf("after %d writes: %d last bytes, want %d", i+1, len(c.last), len(want))
		}
		if want := all[:min(len(all), maxPayload)]; !bytes.Equal(c.first, want) || c.size != len(all) {
			t.Fatalf("after %d writes: %d first bytes of %d, want %d of %d", i+1, len(c.first), c.size, len(want), len(all))
		}
	}
}

func TestHandlerThatFailsIsOneWarning(t *testing.T) {
	hs, logged := startHandlers(t, handlerConfig{}, "member-join=echo first; echo 'it broke' >&2; echo; exit 3", "user:deploy=kill -9 $$")
	hs.deliver(joinOf("a"), nil)
	logged.waitFor(t, "[WARN]", 1)
	hs.deliver(userEventOf("deploy", "x", 1, false), nil)
	logged.waitFor(t, "[WARN]", 2)
	for _, want := range []string{
		`(?m)^\[WARN\] handler 'member-join=echo first; .* exit 3' failed on member-join: exit status 3 after \d+ms: it broke$`,
		`(?m)^\[WARN\] handler 'user:deploy=kill -9 \$\$' failed on user:deploy: signal: killed after \d+ms: \(no output\)$`,
		`(?m)^\[DEBUG\] Event 'member-join' script output: first$`,
	} {
		if !regexp.MustCompile(want).MatchString(logged.String()) {
			t.Errorf("no %s in\n%s", want, logged)
		}
	}
}

func TestHandlerThatCannotRunIsOneWarningARun(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain.sh")
	if err := os.WriteFile(plain, []byte("#!/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	check := func(t *testing.T, shell string) {
		for _, script := range []string{"/nowhere/missing.sh", plain} {
			hs, logged := startHandlers(t, handlerConfig{shell: shell}, script)
			for i := range 3 {
				hs.deliver(userEventOf("e", "", uint64(i), false), nil)
				logged.waitFor(t, "[WARN]", i+1)
			}
			hs.close()
			if n := strings.Count(logged.String(), "[WARN]"); n != 3 || strings.Count(logged.String(), "[WARN] handler '"+script+"' failed on user:e: ") != 3 {
				t.Errorf("%d warnings: %s", n, logged)
			}
			t.Logf("%s", strings.Split(logged.String(), "[WARN]")[1])
		}
	}
	eachShell(t, check)
	t.Run("no shell", func(t *testing.T) { check(t, "/nowhere/sh") })
}

func TestShellThatIsMissingLeavesProgramsToRun(t *testing.T) {
	t.Setenv("HANDLER_TEST_ROLE", "program")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	hs, logged := startHandlers(t, handlerConfig{shell: "/nowhere/sh"}, self, "member-join="+self+"  -x  b=c ")
	hs.deliver(joinOf("a"), nil)
	logged.waitFor(t, "script output: args [] event member-join\na\t172.17.0.20\t\t\n", 1)
	logged.waitFor(t, `script output: args ["-x" "b=c"] event member-join`, 1)
	for _, script := range []string{"a | b", "a && b", "a; b", "echo $X", "a > b", "a 'b c'", `a "b"`, "a *", "A=1 a", "a &", "a\nb", "a `b`", "(a)", `a\ b`} {
		_, err := newHandlers(handlerConfig{specs: []string{"*=" + script}, shell: "/nowhere/sh"})
		if err == nil || !strings.Contains(err.Error(), strconv.Quote("*="+script)) || !strings.Contains(err.Error(), "no /nowhere/sh here") {
			t.Errorf("%q: %v", script, err)
		}
	}
}

// ---- answers

// answersTo runs a handler on a query, and returns how it answered and what.
func answersTo(t *testing.T, script string) (reply, string) {
	t.Helper()
	hs, _ := startHandlers(t, handlerConfig{}, "query=:; "+script)
	type said struct {
		r    reply
		text string
	}
	got := make(chan said, 1)
	hs.deliver(Event{kind: eventQuery, update: update{Name: "q", Timeout: 20000}}, func(r reply, b []byte) { got <- said{r, string(b)} })
	select {
	case s := <-got:
		return s.r, s.text
	case <-time.After(20 * time.Second):
		t.Fatalf("no answer from %s", script)
	}
	return 0, ""
}

func TestQueryThatNoHandlerWantsIsAnsweredAtOnce(t *testing.T) {
	hs, _ := startHandlers(t, handlerConfig{}, "query:other=true", "user=true")
	got := make(chan reply)
	hs.deliver(Event{kind: eventQuery, update: update{Name: "load", Timeout: 20000}}, func(r reply, _ []byte) { got <- r })
	if r := <-got; r != replyNothing {
		t.Errorf("the reply is %d", r)
	}
}

func TestQueryAnswerThatIsLongIsItsFirstBytesWithItsTrueSize(t *testing.T) {
	const lines = `i=0; while [ $i -lt 5000 ]; do echo "line $i"; i=$((i+1)); done` // 48,890 bytes
	for script, want := range map[string]struct {
		r           reply
		begin, note string
	}{
		lines:                       {replyDone, "line 0\nline 1\n", "... (cut: 48890 bytes)\n"},
		lines + "; exit 3":          {replyFailed, "exit status 3\nline 0\nline 1\n", "... (cut: 48904 bytes)\n"},
		"echo a; exit 3":            {replyFailed, "exit status 3\na\n", ""},
		"echo a":                    {replyDone, "a\n", ""},
		"printf '%01024d' 0":        {replyDone, strings.Repeat("0", 1024), ""},
		"printf '%01025d' 0":        {replyDone, "000", "... (cut: 1025 bytes)\n"},
		"echo b >&2; exit 1":        {replyFailed, "exit status 1\nb\n", ""},
		":":                         {replyDone, "", ""},
		"echo b >&2; echo a":        {replyDone, "a\n", ""},
		"echo b >&2; echo a; false": {replyFailed, "exit status 1\na\nb\n", ""},
	} {
		r, text := answersTo(t, script)
		if r != want.r || !strings.HasPrefix(text, want.begin) || want.note == "" && text != want.begin {
			t.Errorf("%s: reply %d, %.60q", script, r, text)
		}
		if want.note != "" && (len(text) != maxPayload || !strings.HasSuffix(text, want.note)) {
			t.Errorf("%s: %d bytes, the end is %q", script, len(text), text[max(0, len(text)-30):])
		}
	}
}

// The gossip hands a way to answer in with every event. A member event that had one
// logged what went to stdout before all that went to stderr.
func TestQueryAloneIsAnsweredByAHandler(t *testing.T) {
	hs, logged := startHandlers(t, handlerConfig{}, "echo first >&2; echo second; exit 1")
	for _, ev := range []Event{joinOf("a"), userEventOf("e", "", 1, false)} {
		hs.deliver(ev, func(reply, []byte) { t.Errorf("%s is answered", ev.kind) })
	}
	logged.waitFor(t, "script output: first\nsecond\n", 2)
	logged.waitFor(t, "ms: second\n", 2)
	hs.close()
}

// ---- the end

func TestHandlersCloseLetsThoseThatRunEnd(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hs, logged := startHandlers(t, handlerConfig{grace: 20 * time.Second, env: extraEnv("DIR=" + dir)},
		`*=echo $SERF_EVENT >>"$DIR/began"; sleep 0.2; echo $SERF_EVENT >>"$DIR/ended"`)
	hs.deliver(joinOf("a"), nil)
	hs.deliver(failOf("a"), nil)
	eventually(t, "the first run began", func() bool { return readFile(dir+"/began") != "" })
	began := time.Now()
	hs.close()
	hs.deliver(joinOf("late"), nil)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("Close took %v for 0.2 s of work", took)
	}
	if b, e := readFile(dir+"/began"), readFile(dir+"/ended"); b != "member-join\n" || e != b {
		t.Errorf("began %q, ended %q", b, e)
	}
	if strings.Contains(logged.String(), "[WARN]") {
		t.Errorf("log: %s", logged)
	}
}

func TestHandlersCloseEndsThoseThatHangAfterTheGrace(t *testing.T) {
	t.Parallel()
	needProc(t)
	dir := t.TempDir()
	hs, logged := startHandlers(t, handlerConfig{grace: 300 * time.Millisecond, env: extraEnv("DIR=" + dir)},
		`*=echo $$ >"$DIR/meek"; sleep 300 & sleep 300`,
		`*=trap "" TERM; echo $$ >"$DIR/stubborn"; while :; do sleep 1; done`)
	hs.deliver(joinOf("a"), nil)
	meek, stubborn := pidIn(t, dir+"/meek"), pidIn(t, dir+"/stubborn")
	began := time.Now()
	hs.close()
	if took, limit := time.Since(began), 300*time.Millisecond+closeKillAfter; took < limit || took > limit+5*time.Second {
		t.Errorf("Close took %v", took)
	}
	for _, pgid := range []int{meek, stubborn} {
		eventually(t, "the group is gone", func() bool { return groupAlive(pgid) == 0 })
	}
	logged.waitFor(t, "ended with the agent, signal: terminated", 1)
	logged.waitFor(t, "ended with the agent, signal: killed", 1)
}

func TestHandlersCloseShortensTheWaitOfATimeout(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hs, _ := startHandlers(t, handlerConfig{timeout: 50 * time.Millisecond, env: extraEnv("DIR=" + dir)},
		`*=trap "echo >$DIR/termed" TERM; while :; do sleep 0.1; done`)
	hs.deliver(joinOf("a"), nil)
	eventually(t, "TERM arrived", func() bool { return readFile(dir+"/termed") != "" })
	began := time.Now()
	hs.close()
	if took := time.Since(began); took > closeKillAfter+time.Second {
		t.Errorf("Close took %v", took)
	}
}

// ---- figures

// BenchmarkDeliverToFirstLine measures from Deliver to what the script's first
// line does, seen through a fifo.
func BenchmarkDeliverToFirstLine(b *testing.B) {
	for _, shell := range []string{"/bin/dash", "/bin/bash"} {
		b.Run(filepath.Base(shell), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "fifo")
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				b.Fatal(err)
			}
			fifo, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer fifo.Close()
			hs, logged := startHandlers(b, handlerConfig{shell: shell, env: extraEnv("FIFO=" + path)}, `*=echo x >"$FIFO"; cat >/dev/null`)
			buf := make([]byte, 10)
			var took []time.Duration
			for i := 0; b.Loop(); i++ {
				began := time.Now()
				hs.deliver(userEventOf("e", "payload", uint64(i), false), nil)
				fifo.Read(buf)
				took = append(took, time.Since(began))
				logged.waitFor(b, "script output", 1)
				logged.mu.Lock()
				logged.b.Reset()
				logged.mu.Unlock()
			}
			slices.SortFunc(took, cmp.Compare[time.Duration])
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}

// To end a group costs nothing that grows with the number of processes of the host, while a script ignores TERM.
func TestHandlerGroupThatIgnoresTermCostsNoSearchOfTheHost(t *testing.T) {
	crowd := exec.Command("/bin/sh", "-c", "i=0; while [ $i -lt 600 ]; do sleep 60 & i=$((i+1)); done; wait")
	crowd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := crowd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-crowd.Process.Pid, syscall.SIGKILL)
		crowd.Wait()
	})
	ready := filepath.Join(t.TempDir(), "ready")
	hs, _ := startHandlers(t, handlerConfig{}, "trap '' TERM; echo >"+ready+"; while :; do sleep 1; done")
	hs.deliver(joinOf("a"), nil)
	eventually(t, "the script runs", func() bool { _, err := os.Stat(ready); return err == nil })

	used := func() time.Duration {
		var r syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &r)
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	before := used()
	hs.close() // takes closeKillAfter
	took := used() - before
	t.Logf("%v of processor time", took)
	if took > 150*time.Millisecond {
		t.Errorf("%v of processor time", took)
	}
}
