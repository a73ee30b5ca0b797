// handler.go: scripts that run on events.
//
// A handler is one -event-handler spec with a queue of its own: events wait in order, and one run at a time takes
// what waited together. Scripts are strangers: one may hang, fork, print for ever or ignore TERM,
// and costs nobody but itself. It knows nothing of the protocol.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
	// pipesFor bounds the wait for the output of a script that has ended: a child in the background may hold the
	// pipe open, and even go on printing.
	pipesFor = 50 * time.Millisecond
)

// handlerConfig says what runs when, and how.
type handlerConfig struct {
	specs   []string        // -event-handler values
	timeout time.Duration   // of one run; 0: none
	grace   time.Duration   // what close leaves to running handlers
	env     func() []string // added to the agent's environment; asked at each run
	log     *log.Logger
	shell   string // "": /bin/sh
}

// handlers are all handlers of one agent.
type handlers struct {
	handlerConfig
	mu      sync.Mutex // guards all and timeout, which a reload changes
	all     []*handler
	ending  context.Context // done: what still runs is ended, and nothing new is taken
	end     context.CancelCauseFunc
	workers sync.WaitGroup
}

type handler struct {
	handlers *handlers
	spec     string // the spec, for the log
	events   []string
	script   string
	argv     []string

	mu           sync.Mutex // guards what follows
	working      bool       // somebody takes what is queued
	queue        []delivery
	dropped      int    // since the last run
	droppedTotal int    // in all
	last         string // how the last run ended
}

// delivery is an event on its way to a handler.
type delivery struct {
	Event
	until  time.Time           // of a query
	answer func(reply, []byte) // of a query, for the handler that answers it
}

// ---- specs ----

// newHandlers parses the specs.
func newHandlers(cfg handlerConfig) (*handlers, error) {
	hs := &handlers{handlerConfig: cfg}
	hs.ending, hs.end = context.WithCancelCause(context.Background())
	for _, spec := range cfg.specs {
		h, err := newHandler(spec, cmp.Or(cfg.shell, "/bin/sh"))
		if err != nil {
			return nil, fmt.Errorf("event handler %q: %w", spec, err)
		}
		h.handlers = hs
		hs.all = append(hs.all, h)
	}
	return hs, nil
}

// reload replaces the handlers by those of cfg. One that stays goes on with what it has queued; one that goes ends what
// it has queued, and gets nothing new. An error changes nothing.
func (hs *handlers) reload(cfg handlerConfig) error {
	cfg.shell = hs.shell
	next, err := newHandlers(cfg)
	if err != nil {
		return err
	}

	hs.mu.Lock()
	defer hs.mu.Unlock()
	stay := slices.Clone(hs.all)
	for i, h := range next.all {
		h.handlers = hs
		same := func(o *handler) bool { return o.script == h.script && slices.Equal(o.events, h.events) }
		if at := slices.IndexFunc(stay, same); at >= 0 {
			next.all[i] = stay[at]
			stay = slices.Delete(stay, at, at+1)
		}
	}
	hs.all = next.all
	hs.timeout = cfg.timeout
	return nil
}

// runTimeout is how long a run may take; 0: as long as it likes.
func (hs *handlers) runTimeout() time.Duration {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	return hs.timeout
}

// now are the handlers at this moment.
func (hs *handlers) now() []*handler {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	return hs.all
}

// newHandler takes "script" or "event[,event...]=script" apart.
func newHandler(spec, shell string) (*handler, error) {
	events, script, found := strings.Cut(spec, "=")
	h := &handler{spec: oneLine(spec), last: "never", events: strings.Split(events, ","), script: script}
	bad := checkEvents(h.events)
	if !found && bad == nil { // a forgotten script, or a list that was cut at its commas: run, it would only fail later
		return nil, fmt.Errorf("there is no script; write %s=SCRIPT", spec)
	} else if !found {
		h.events, h.script, bad = []string{"*"}, spec, nil
	}
	words := strings.Fields(h.script)
	switch _, noShell := exec.LookPath(shell); {
	case len(words) == 0:
		return nil, errors.New("the script is empty")
	case bad != nil:
		return nil, bad
	case noShell == nil:
		h.argv = []string{shell, "-c", h.script}
	case strings.ContainsAny(h.script, shellSyntax) || strings.Contains(words[0], "="):
		return nil, fmt.Errorf("the script needs a shell, and there is no %s here; "+
			"only a program with plain arguments can run", shell)
	default: // an image built from scratch has no shell: there a program with plain arguments must do
		h.argv = words
	}
	return h, nil
}

// shellSyntax are the characters that would mean something to a shell.
const shellSyntax = "|&;<>()$`\\\"'*?[]{}~#!\n"

func checkEvents(events []string) error {
	for _, ev := range events {
		kind, name, named := strings.Cut(ev, ":")
		k := eventKind(slices.Index(eventNames[1:], kind) + 1)
		if ev != "*" && (k == 0 || named && (k < eventUser || name == "")) {
			return fmt.Errorf("unknown event %.60q; there are %s, user:NAME, query:NAME and * "+
				"(a script that holds a '=' is written *=SCRIPT)", ev, strings.Join(eventNames[1:], ", "))
		}
	}
	return nil
}

// matches reports whether events, as in a spec, hold that of kind and name.
func matches(events []string, kind eventKind, name string) bool {
	return slices.ContainsFunc(events, func(ev string) bool {
		return ev == "*" || ev == kind.String() || ev == kind.String()+":"+name
	})
}

// ---- queues ----

// deliver queues ev for every handler that wants it. It never blocks. The first handler that a query finds is the
// one that answers it; where there is none, that is the answer.
func (hs *handlers) deliver(ev Event, answer func(reply, []byte)) {
	d := delivery{Event: ev}
	if ev.kind == eventQuery {
		d.until, d.answer = time.Now().Add(time.Duration(ev.Timeout)*ms), answer
	}
	for _, h := range hs.now() {
		if hs.ending.Err() == nil && matches(h.events, ev.kind, ev.Name) {
			h.enqueue(d)
			d.answer = nil
		}
	}
	if d.answer != nil {
		go answer(replyNothing, nil)
	}
}

func (h *handler) enqueue(d delivery) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := -1
	if d.Coalesce {
		i = slices.IndexFunc(h.queue, func(q delivery) bool { return q.Coalesce && q.Name == d.Name })
	}
	switch {
	case i >= 0 && h.queue[i].LTime > d.LTime: // floods overtake each other: the last is the last one sent
		return
	case i >= 0:
		h.queue = slices.Delete(h.queue, i, i+1)
	case len(h.queue) == queueLimit:
		h.queue = h.queue[1:]
		h.droppedTotal++
		if h.dropped++; h.dropped == 1 {
			h.handlers.log.Printf("[WARN] handler '%s' is behind: %d events wait, dropping the oldest", h.spec, queueLimit)
		}
	}
	if h.queue = append(h.queue, d); !h.working {
		h.working = true
		h.handlers.workers.Go(h.work)
	}
}

// take removes what the next run is about: consecutive member events of one kind, one user event, or one query.
// Where nothing waits it is nothing, and whoever works has to stop.
func (h *handler) take() []delivery {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.working = len(h.queue) > 0; !h.working {
		h.queue = nil // lets go of what a burst has taken
		return nil
	}
	if h.dropped > 0 {
		h.handlers.log.Printf("[WARN] handler '%s' was behind: %d events dropped", h.spec, h.dropped)
		h.dropped = 0
	}
	n, kind := 1, h.queue[0].kind
	for kind < eventUser && n < len(h.queue) && h.queue[n].kind == kind {
		n++
	}
	batch := h.queue[:n:n]
	h.queue = h.queue[n:]
	return batch
}

// info is what is known of the handlers: group, key, value; and so on. The keys are Serf's, EVENT:NAME, and the
// values of equal ones stand side by side.
func (hs *handlers) info() (facts []string) {
	const group = "event_handlers"
	place := make(map[string]int) // of each key's value
	add := func(key, value string) {
		if i, ok := place[key]; ok {
			facts[i] += ", " + value
			return
		}
		place[key] = len(facts) + 2
		facts = append(facts, group, key, value)
	}
	for _, h := range hs.now() {
		for _, ev := range h.events {
			kind, name, _ := strings.Cut(ev, ":")
			add(kind+":"+name, h.script)
		}

		events := strings.Join(h.events, ",")
		h.mu.Lock()
		add(events+" waiting", strconv.Itoa(len(h.queue)))
		add(events+" dropped", strconv.Itoa(h.droppedTotal))
		add(events+" last run", h.last)
		h.mu.Unlock()
	}
	return facts
}

// work runs what is queued, until that is nothing. Late, nobody wants the answer to a query.
func (h *handler) work() {
	for batch := h.take(); batch != nil; batch = h.take() {
		if first := batch[0]; first.kind != eventQuery || time.Now().Before(first.until) {
			h.run(batch)
		}
	}
}

// close stops the handlers: what runs, and then the last events, have the grace to end; then their groups are
// ended. Whatever else waits is dropped.
func (hs *handlers) close(last ...Event) {
	for _, h := range hs.now() {
		h.mu.Lock()
		h.queue = nil
		h.mu.Unlock()
	}
	for _, ev := range last {
		hs.deliver(ev, nil)
	}
	waitAtMost(hs.grace, hs.workers.Wait)
	hs.end(errors.New("ended with the agent"))
	waitAtMost(5*closeKillAfter, hs.workers.Wait) // a process that hangs in the kernel survives even KILL
}

// ---- runs ----

// run runs the handler's script once, to its end or its timeout, and tells what came of it.
func (h *handler) run(batch []delivery) {
	event, started := batch[0], time.Now()
	var printed, answer outputCapture // answer: what a query's handler prints to stdout
	status := h.runScript(batch, &printed, &answer)
	end := fmt.Sprintf("%s after %v", cmp.Or(status, "well"), time.Since(started).Round(time.Millisecond))
	h.mu.Lock()
	h.last = end + ", " + started.Format(time.DateTime)
	h.mu.Unlock()
	output := string(answer.last) + string(printed.last)
	h.handlers.log.Printf("[DEBUG] Event '%s' script output: %s", event.kind, output)
	r, text, size := replyDone, string(answer.first), answer.size
	if status != "" {
		what := strings.TrimSuffix(event.kind.String()+":"+event.Name, ":")
		lines := strings.Split(strings.TrimSpace(output), "\n")
		h.handlers.log.Printf("[WARN] handler '%s' failed on %s: %s: %s", h.spec, oneLine(what), end,
			oneLine(cmp.Or(lines[len(lines)-1], "(no output)")))
		r, text, size = replyFailed, status+"\n"+text+string(printed.first), len(status)+1+size+printed.size
	}
	if event.answer != nil {
		if note := fmt.Sprintf("... (cut: %d bytes)\n", size); size > maxPayload {
			text = text[:maxPayload-len(note)] + note
		}
		event.answer(r, []byte(text))
	}
}

// runScript runs the script in a process group of its own. The status says what was wrong with its end, if anything.
func (h *handler) runScript(batch []delivery, printed, answer *outputCapture) (status string) {
	ctx, cancel := context.WithTimeoutCause(h.handlers.ending, cmp.Or(h.handlers.runTimeout(), math.MaxInt64), errors.New("timed out"))
	defer cancel()
	cmd := exec.CommandContext(ctx, h.argv[0], h.argv[1:]...)
	cmd.Cancel = func() error { endGroup(cmd.Process.Pid, h.handlers.ending); return nil }
	cmd.WaitDelay = pipesFor // of stdin, which a child in the background may hold open
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env, cmd.Stdin = h.environ(batch[0].Event), strings.NewReader(stdinFor(batch))
	stdout, err := printed, printed.open()
	if batch[0].answer != nil && err == nil {
		stdout, err = answer, answer.open()
	}
	if cmd.Stdout, cmd.Stderr = stdout.w, printed.w; err == nil {
		err = cmd.Run()
	}
	printed.close()
	answer.close()
	switch {
	case cmd.Process == nil:
		return fmt.Sprintf("cannot start: %v", cmp.Or(context.Cause(ctx), err))
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return ""
	case ctx.Err() != nil:
		return fmt.Sprintf("%v, %v", context.Cause(ctx), cmd.ProcessState)
	default:
		return err.Error()
	}
}

// endGroup ends a process group: TERM, then KILL for whoever is still there, the leader or what it left behind.
func endGroup(pgid int, ending context.Context) {
	syscall.Kill(-pgid, syscall.SIGTERM)
	for began := time.Now(); groupLives(pgid); time.Sleep(5 * time.Millisecond) {
		took := time.Since(began)
		if took > killAfter || took > closeKillAfter && ending.Err() != nil {
			break
		}
	}
	syscall.Kill(-pgid, syscall.SIGKILL)
}

// groupLives reports whether something of a process group runs. A zombie that nobody has reaped does not, and
// where there is a /proc it is told apart.
func groupLives(pgid int) bool {
	if syscall.Kill(-pgid, 0) != nil {
		return false
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	runs := regexp.MustCompile(fmt.Sprintf(`\) [^ZX] \d+ %d `, pgid)) // state, parent, group
	return len(stats) == 0 || slices.ContainsFunc(stats, func(f string) bool {
		b, _ := os.ReadFile(f)
		return runs.Match(b)
	})
}

// outputCapture keeps the first and the last bytes written to it, and their number.
type outputCapture struct {
	first, last []byte
	size        int
	r, w        *os.File       // a pipe
	copying     sync.WaitGroup // from it
}

// open makes a pipe for a script to print to.
func (c *outputCapture) open() (err error) {
	c.r, c.w, err = os.Pipe()
	c.copying.Go(func() { c.r.WriteTo(c) })
	return err
}

// close waits, after the script has ended, until all is read: not for a child in the background that holds the
// pipe open, but in looks and not by the clock, as this agent may be kept from running where it has a small share
// of a processor.
func (c *outputCapture) close() {
	c.w.Close()
	for range 10 {
		if waitAtMost(pipesFor/10, c.copying.Wait) {
			break
		}
	}
	c.r.Close()
	c.copying.Wait()
}

func (c *outputCapture) Write(p []byte) (int, error) {
	c.size += len(p)
	c.first = append(c.first, p[:min(len(p), maxPayload-len(c.first))]...)
	c.last = append(c.last, p[max(0, len(p)-outputKept):]...)
	c.last = slices.Delete(c.last, 0, max(0, len(c.last)-outputKept))
	return len(p), nil
}

// oneLine makes s fit to stand inside a log line.
func oneLine(s string) string {
	if s = strings.NewReplacer("\n", " ", "\r", " ").Replace(s); len(s) > 200 {
		s = s[:200] + "..."
	}
	return s
}

// ---- what scripts are told ----

// stdinFor is what a script reads: Serf's line for each member, or the payload.
func stdinFor(batch []delivery) string {
	if text := string(batch[0].Payload); batch[0].kind >= eventUser {
		if text != "" {
			text = strings.TrimSuffix(text, "\n") + "\n"
		}
		return text
	}
	var b strings.Builder
	escape := strings.NewReplacer("\t", `\t`, "\n", `\n`).Replace
	for _, ev := range batch {
		m := ev.Member
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\n", escape(m.Name), m.Addr.Addr().Unmap(),
			escape(m.Tags.asMap()["role"]), escape(strings.Join(splitNUL(m.Tags), ",")))
	}
	return b.String()
}

// environ is the environment of a run about ev; of doubles, the last counts.
func (h *handler) environ(ev Event) []string {
	env := slices.Concat(os.Environ(), h.handlers.env(), []string{"SERF_EVENT=" + ev.kind.String()})
	name := strings.ReplaceAll(ev.Name, "\x00", "") // a NUL would make every start fail
	switch ev.kind {
	case eventUser:
		env = append(env, "SERF_USER_EVENT="+name, fmt.Sprint("SERF_USER_LTIME=", ev.LTime))
	case eventQuery:
		env = append(env, "SERF_QUERY_NAME="+name, fmt.Sprint("SERF_QUERY_LTIME=", ev.LTime))
	}
	return env
}

// handlerEnv is what scripts are told about their agent, under Serf's names. SERF_RPC_AUTH is set even when empty:
// an inherited one is not this agent's.
func handlerEnv(self Member, alone bool, rpcAddr, rpcAuth string) []string {
	env := []string{
		"SERF_SELF_NAME=" + self.Name,
		"SERF_SELF_ROLE=" + self.Tags.asMap()["role"],
		"SERF_SELF_ADDR=" + self.Addr.String(),
		"SERF_RPC_ADDR=" + rpcAddr,
		"SERF_RPC_AUTH=" + rpcAuth,
		"SERF_SELF_ALONE=" + map[bool]string{true: "1"}[alone],
	}
	odd := regexp.MustCompile("[^0-9A-Z]") // in the name of a variable
	for _, tag := range splitNUL(self.Tags) {
		k, v, _ := strings.Cut(tag, "=")
		env = append(env, "SERF_TAG_"+odd.ReplaceAllString(strings.ToUpper(k), "_")+"="+v)
	}
	return env
}
