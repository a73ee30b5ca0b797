// handler.go: scripts that run on events.
//
// A handler is one -event-handler spec with a queue and a goroutine of its
// own: events wait in order, and one run at a time takes what waited together.
// Scripts are strangers: one may hang, fork, print for ever or ignore TERM, and
// costs nobody but itself. It knows nothing of the protocol.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	queueLimit = 4096    // events that may wait for one handler
	outputKept = 8 << 10 // bytes of a run's output that are logged
	killAfter  = 5 * time.Second
	// closeKillAfter is killAfter once the agent stops: somebody waits for it.
	closeKillAfter = time.Second
	// pipesFor bounds the wait for the output of a script that has ended: a child
	// in the background may hold the pipe open, and even go on printing.
	pipesFor = 50 * time.Millisecond
)

// handlerConfig says what runs when, and how.
type handlerConfig struct {
	specs   []string        // -event-handler values
	timeout time.Duration   // of one run; 0: none
	grace   time.Duration   // what Close leaves to running handlers
	env     func() []string // added to the agent's environment; asked at each run
	log     *log.Logger
	shell   string // "": /bin/sh
}

// handlers are all handlers of one agent.
type handlers struct {
	cfg     handlerConfig
	all     []*handler
	open    context.Context // done: nothing new is taken
	stop    context.CancelFunc
	hurry   chan struct{} // closed: the grace is over
	workers sync.WaitGroup
	closing sync.Once
}

type handler struct {
	events, script string // as the spec has them
	filters        []eventFilter
	argv           []string
	wake           chan struct{} // holds a token when something was queued

	mu      sync.Mutex
	queue   []delivery
	dropped int    // since the last run
	lost    int    // in all
	last    string // how the last run ended
}

// delivery is an event on its way to a handler.
type delivery struct {
	Event
	until  time.Time           // of a query: later nobody wants the answer
	answer func(reply, []byte) // of a query, for the handler that answers it
}

// eventFilter matches events; kind 0 is every kind, an empty name every user event
// or query.
type eventFilter struct {
	kind eventKind
	name string
}

func wants(filters []eventFilter, kind eventKind, name string) bool {
	return slices.ContainsFunc(filters, func(f eventFilter) bool {
		return f.kind == 0 || f.kind == kind && (f.name == "" || f.name == name)
	})
}

// newHandlers parses the specs and starts a queue for each.
func newHandlers(cfg handlerConfig) (*handlers, error) {
	cfg.shell = cmp.Or(cfg.shell, "/bin/sh")
	hs := &handlers{cfg: cfg, hurry: make(chan struct{})}
	for _, spec := range cfg.specs {
		h := &handler{wake: make(chan struct{}, 1)}
		var err error
		if h.events, h.script, err = parseSpec(spec); err == nil {
			h.filters, err = parseFilters(strings.Split(h.events, ","))
		}
		if err == nil {
			h.argv, err = commandLine(cfg.shell, h.script)
		}
		if err != nil {
			return nil, fmt.Errorf("event handler %q: %w", spec, err)
		}
		hs.all = append(hs.all, h)
	}
	hs.open, hs.stop = context.WithCancel(context.Background())
	for _, h := range hs.all {
		hs.workers.Go(func() { hs.work(h) })
	}
	return hs, nil
}

// parseSpec takes "script" or "event[,event...]=script" apart.
func parseSpec(spec string) (events, script string, err error) {
	events, script, found := strings.Cut(spec, "=")
	if !found {
		// Events alone are a forgotten script, or a list that was cut at its
		// commas; run as a script they would only fail later.
		if _, err := parseFilters(strings.Split(spec, ",")); err == nil {
			return "", "", fmt.Errorf("there is no script; write %s=SCRIPT", spec)
		}
		events, script = "*", spec
	}
	if strings.TrimSpace(script) == "" {
		err = errors.New("the script is empty")
	}
	return events, script, err
}

func parseFilters(events []string) (fs []eventFilter, err error) {
	for _, ev := range events {
		kind, name, named := strings.Cut(ev, ":")
		k := slices.Index(eventNames[1:], kind) + 1
		switch {
		case ev == "*": // every kind: 0
		case k == 0 || named && (eventKind(k) < eventUser || name == ""):
			return nil, fmt.Errorf("unknown event %.60q; there are %s, user:NAME, query:NAME and * (a script that holds a '=' is written *=SCRIPT)",
				ev, strings.Join(eventNames[1:], ", "))
		}
		fs = append(fs, eventFilter{eventKind(k), name})
	}
	return fs, nil
}

// shellSyntax are the characters that would mean something to a shell.
const shellSyntax = "|&;<>()$`\\\"'*?[]{}~#!\n"

// commandLine is what runs script. An image built from scratch has no shell:
// there a program with plain arguments must do.
func commandLine(shell, script string) ([]string, error) {
	if _, err := exec.LookPath(shell); err == nil {
		return []string{shell, "-c", script}, nil
	}
	words := strings.Fields(script)
	if strings.ContainsAny(script, shellSyntax) || strings.Contains(words[0], "=") {
		return nil, fmt.Errorf("the script needs a shell, and there is no %s here; only a program with plain arguments can run", shell)
	}
	return words, nil
}

// Answers names the queries that some handler answers; "" is every query.
func (hs *handlers) answers() (names []string) {
	for _, h := range hs.all {
		for _, f := range h.filters {
			if f.kind == 0 || f.kind == eventQuery {
				names = append(names, f.name)
			}
		}
	}
	return names
}

// Deliver queues ev for every handler that wants it. It never blocks. The first
// handler that a query finds is the one that answers it.
func (hs *handlers) deliver(ev Event, answer func(reply, []byte)) {
	d := delivery{Event: ev, until: time.Now().Add(ev.within), answer: answer}
	for _, h := range hs.all {
		if !wants(h.filters, ev.kind, ev.name) || hs.open.Err() != nil {
			continue
		}
		if h.enqueue(d) {
			hs.cfg.log.Printf("[WARN] handler '%s' is behind: %d events wait, dropping the oldest", h, queueLimit)
		}
		if ev.kind == eventQuery {
			d.answer = nil
		}
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

func (h *handler) String() string {
	if h.events == "*" {
		return oneLine(h.script)
	}
	return oneLine(h.events + "=" + h.script)
}

// state is how many events wait, how many were dropped, and how the last run ended.
func (h *handler) state() (waiting, lost int, last string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.queue), h.lost, cmp.Or(h.last, "never")
}

// enqueue reports whether it was the first since the last run to drop another.
func (h *handler) enqueue(d delivery) (overflow bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.coalesce {
		i := slices.IndexFunc(h.queue, func(q delivery) bool { return q.coalesce && q.name == d.name })
		if i >= 0 && h.queue[i].lTime > d.lTime {
			return false // floods overtake each other: the last is the last one sent
		}
		if i >= 0 {
			h.queue = slices.Delete(h.queue, i, i+1)
		}
	}
	if len(h.queue) == queueLimit {
		h.queue[0] = delivery{}
		h.queue = h.queue[1:]
		h.dropped++
		h.lost++
		overflow = h.dropped == 1
	}
	h.queue = append(h.queue, d)
	return overflow
}

// take removes what the next run is about: consecutive member events of one
// kind, one user event, or one query whose time is not over.
func (h *handler) take() (batch []delivery, dropped int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.queue = h.queue[h.late():]
	if len(h.queue) == 0 {
		h.queue = nil // lets go of what a burst has taken
		return nil, 0
	}
	n := 1
	for kind := h.queue[0].kind; kind < eventUser && n < len(h.queue) && h.queue[n].kind == kind; {
		n++
	}
	batch, h.queue = h.queue[:n:n], h.queue[n:]
	dropped, h.dropped = h.dropped, 0
	return batch, dropped
}

// late counts the queries at the front whose time is over.
func (h *handler) late() int {
	i := slices.IndexFunc(h.queue, func(d delivery) bool { return d.kind != eventQuery || time.Now().Before(d.until) })
	if i < 0 {
		return len(h.queue)
	}
	return i
}

// work runs what comes, and at the end what is left: Close decides what that is.
func (hs *handlers) work(h *handler) {
	for {
		batch, dropped := h.take()
		if dropped > 0 {
			hs.cfg.log.Printf("[WARN] handler '%s' was behind: %d events dropped", h, dropped)
		}
		switch {
		case batch != nil:
			hs.run(h, batch)
		case hs.open.Err() != nil:
			return
		default:
			select {
			case <-hs.open.Done():
			case <-h.wake:
			}
		}
	}
}

// run runs the handler's script once, to its end or its timeout.
func (hs *handlers) run(h *handler, batch []delivery) {
	started, event := time.Now(), batch[0]
	var status, output string // status: what was wrong with the end
	r, err := startRun(h.argv, hs.environ(event.Event), stdinFor(batch), event.answer != nil)
	if err != nil {
		status, output = "cannot start", err.Error()
	} else {
		status = hs.await(r)
		output = string(r.answer) + string(r.output)
		hs.cfg.log.Printf("[DEBUG] Event '%s' script output: %s", event.kind, output)
	}
	h.mu.Lock()
	h.last = fmt.Sprintf("%s after %v, %s", cmp.Or(status, "well"), time.Since(started).Round(time.Millisecond), started.Format(time.DateTime))
	h.mu.Unlock()
	switch {
	case event.answer == nil:
	case status != "":
		event.answer(replyFailed, cut(status+"\n"+output))
	default:
		event.answer(replyDone, cut(output))
	}
	if status == "" {
		return
	}
	what := event.kind.String()
	if event.name != "" {
		what += ":" + event.name
	}
	output = strings.TrimSpace(output)
	last := cmp.Or(output[strings.LastIndexByte(output, '\n')+1:], "(no output)")
	hs.cfg.log.Printf("[WARN] handler '%s' failed on %s: %s after %v: %s", h, oneLine(what), status,
		time.Since(started).Round(time.Millisecond), oneLine(last))
}

// cut makes an answer fit, and says so.
func cut(s string) []byte {
	if note := fmt.Sprintf("... (cut: %d bytes)\n", len(s)); len(s) > maxPayload {
		s = s[:maxPayload-len(note)] + note
	}
	return []byte(s)
}

// await waits for the script and returns what was wrong with its end, if anything.
func (hs *handlers) await(r *scriptRun) (status string) {
	var timeout <-chan time.Time
	if hs.cfg.timeout > 0 {
		timeout = time.After(hs.cfg.timeout)
	}
	why := "timed out"
	select {
	case err := <-r.exited:
		if err != nil {
			return err.Error()
		}
		return ""
	case <-timeout:
	case <-hs.hurry:
		why = "ended with the agent"
	}
	endGroup(r.cmd.Process.Pid, hs.hurry)
	<-r.exited
	return why + ", " + r.cmd.ProcessState.String()
}

// endGroup ends a process group: TERM, then KILL for whoever is still there,
// the leader or what it left behind.
func endGroup(pgid int, hurry <-chan struct{}) {
	syscall.Kill(-pgid, syscall.SIGTERM)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(killAfter); time.Now().Before(deadline); {
		if !groupLives(pgid) {
			return
		}
		select {
		case <-hurry:
			hurry, deadline = nil, time.Now().Add(closeKillAfter)
		case <-tick.C:
		}
	}
	syscall.Kill(-pgid, syscall.SIGKILL)
}

// groupLives reports whether something of a process group runs. A zombie that
// nobody has reaped does not, and where there is a /proc it is told apart.
func groupLives(pgid int) bool {
	if syscall.Kill(-pgid, 0) != nil {
		return false
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range stats {
		b, _ := os.ReadFile(f)
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // state, parent, group
		if len(fields) > 2 && fields[2] == strconv.Itoa(pgid) && fields[0] != "Z" && fields[0] != "X" {
			return true
		}
	}
	return len(stats) == 0
}

// Close stops the handlers: what runs, and then the last events, have the grace
// to end; then their groups are ended. Whatever else waits is dropped.
func (hs *handlers) close(last ...Event) {
	hs.closing.Do(func() {
		for _, h := range hs.all {
			h.mu.Lock()
			h.queue = nil
			for _, ev := range last {
				if wants(h.filters, ev.kind, ev.name) {
					h.queue = append(h.queue, delivery{Event: ev})
				}
			}
			h.mu.Unlock()
		}
		hs.stop()
		if !waitAtMost(hs.cfg.grace, hs.workers.Wait) {
			close(hs.hurry)
			waitAtMost(2*closeKillAfter, hs.workers.Wait) // a process that hangs in the kernel survives even KILL
		}
	})
}

// scriptRun is one run of a script.
type scriptRun struct {
	cmd    *exec.Cmd
	exited chan error
	output outputTail // whole when exited is told
	answer outputTail // what a query's handler prints to stdout
}

// startRun starts argv in a process group of its own.
func startRun(argv, env []string, stdin []byte, answers bool) (*scriptRun, error) {
	r := &scriptRun{cmd: exec.Command(argv[0], argv[1:]...), exited: make(chan error, 1)}
	r.cmd.Env, r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr = env, bytes.NewReader(stdin), &r.output, &r.output
	if answers {
		r.cmd.Stdout = &r.answer
	}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r.cmd.WaitDelay = pipesFor
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		err := r.cmd.Wait()
		if errors.Is(err, exec.ErrWaitDelay) {
			err = nil
		}
		r.exited <- err
	}()
	return r, nil
}

// outputTail keeps the last bytes written to it.
type outputTail []byte

func (t *outputTail) Write(p []byte) (int, error) {
	*t = append(*t, p[max(0, len(p)-outputKept):]...)
	if over := len(*t) - outputKept; over > 0 {
		*t = append((*t)[:0], (*t)[over:]...)
	}
	return len(p), nil
}

// oneLine makes s fit to stand inside a log line.
func oneLine(s string) string {
	s = strings.NewReplacer("\n", " ", "\r", " ").Replace(s)
	if len(s) > 200 {
		s = s[:200] + "..."
	}
	return s
}

// stdinFor is what a script reads: Serf's line for each member, or the payload.
func stdinFor(batch []delivery) []byte {
	if batch[0].kind >= eventUser {
		p := slices.Clip(batch[0].payload)
		if len(p) > 0 && p[len(p)-1] != '\n' {
			p = append(p, '\n')
		}
		return p
	}
	var b []byte
	escape := strings.NewReplacer("\t", `\t`, "\n", `\n`).Replace
	for _, ev := range batch {
		m := ev.Member
		b = fmt.Appendf(b, "%s\t%s\t%s\t%s\n", escape(m.Name), m.Addr.Addr().Unmap(),
			escape(m.Tags.asMap()["role"]), escape(strings.Join(m.Tags.pairs(), ",")))
	}
	return b
}

// environ is the environment of a run about ev; of doubles, the last counts.
func (hs *handlers) environ(ev Event) []string {
	env := append(os.Environ(), hs.cfg.env()...)
	env = append(env, "SERF_EVENT="+ev.kind.String())
	name, ltime := strings.ReplaceAll(ev.name, "\x00", ""), strconv.FormatUint(ev.lTime, 10) // a NUL would make every start fail
	switch ev.kind {
	case eventUser:
		env = append(env, "SERF_USER_EVENT="+name, "SERF_USER_LTIME="+ltime)
	case eventQuery:
		env = append(env, "SERF_QUERY_NAME="+name, "SERF_QUERY_LTIME="+ltime)
	}
	return env
}

// handlerEnv is what scripts are told about their agent, under Serf's names.
// SERF_RPC_AUTH is set even when empty: an inherited one is not this agent's.
func handlerEnv(self Member, alone bool, rpcAddr, rpcAuth string) []string {
	env := []string{
		"SERF_SELF_NAME=" + self.Name,
		"SERF_SELF_ROLE=" + self.Tags.asMap()["role"],
		"SERF_SELF_ADDR=" + self.Addr.String(),
		"SERF_RPC_ADDR=" + rpcAddr,
		"SERF_RPC_AUTH=" + rpcAuth,
		"SERF_SELF_ALONE=" + map[bool]string{true: "1"}[alone],
	}
	for _, pair := range self.Tags.pairs() {
		k, v, _ := strings.Cut(pair, "=")
		name := strings.Map(func(r rune) rune {
			if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
				return r
			}
			return '_'
		}, strings.ToUpper(k))
		env = append(env, "SERF_TAG_"+name+"="+v)
	}
	return env
}

// runAsInit is the first process of a container: it runs this same program as
// its child and returns that child's exit status. It forwards the signals that
// stop an agent and waits for every process that lost its parent. It starts
// nothing else, because wait4(-1) would take os/exec's children away from it.
func runAsInit() (exit int) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	exe, _ := os.Executable()
	exe = cmp.Or(exe, os.Args[0])
	// In a group of its own, so that ^C at a terminal arrives once: from here.
	child, err := syscall.ForkExec(exe, os.Args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "hamlet: error: cannot start %s: %v\n", exe, err)
		return 1
	}
	go func() {
		for s := range signals {
			syscall.Kill(child, s.(syscall.Signal))
		}
	}()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err != nil && err != syscall.EINTR:
			return 1
		case pid == child && ws.Exited():
			return ws.ExitStatus()
		case pid == child && ws.Signaled():
			return 128 + int(ws.Signal())
		}
	}
}
