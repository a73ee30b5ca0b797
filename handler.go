// handler.go: scripts that run on events.
//
// A handler is one -event-handler spec with a queue of its own: events wait in order, and one run at a time takes
// what waited together. Scripts are strangers: one may hang, fork, print for ever or ignore TERM,
// and costs nobody but itself. It knows nothing of the protocol.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	queueLimit = 4096             // events that may wait for one handler
	outputKept = 8 << 10          // bytes of a run's output that are logged
	slowAfter  = 10 * time.Second // a run that takes longer is one WARN
	killAfter  = 5 * time.Second  // between TERM and KILL
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
	log     logger
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
	runningSince time.Time
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
	if cfg.shell == "" {
		cfg.shell = "/bin/sh"
	}
	hs := &handlers{handlerConfig: cfg}
	hs.ending, hs.end = context.WithCancelCause(context.Background())
	for _, spec := range cfg.specs {
		h, err := newHandler(spec, cfg.shell)
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

// newHandler parses the value of -event-handler.
func newHandler(spec, shell string) (*handler, error) {
	events, script, err := splitSpec(spec)
	if err != nil {
		return nil, err
	}
	argv, err := commandLine(script, shell)
	if err != nil {
		return nil, err
	}
	return &handler{spec: oneLine(spec), events: events, script: script, argv: argv, last: "never"}, nil
}

// splitSpec splits "event[,event...]=script". A script alone runs on every event.
func splitSpec(spec string) (events []string, script string, err error) {
	list, script, hasEvents := strings.Cut(spec, "=")
	if !hasEvents {
		// A list of events whose script was forgotten, or cut at its commas, would only fail later as a script.
		if checkEvents(strings.Split(spec, ",")) == nil {
			return nil, "", fmt.Errorf("there is no script; write %s=SCRIPT", spec)
		}
		list = "*"
		script = spec
	}
	if strings.TrimSpace(script) == "" {
		return nil, "", errors.New("the script is empty")
	}
	events = strings.Split(list, ",")
	return events, script, checkEvents(events)
}

// commandLine is how script is run: by the shell. An image built from scratch has none; there a program with plain
// arguments must do.
func commandLine(script, shell string) ([]string, error) {
	if _, err := exec.LookPath(shell); err == nil {
		return []string{shell, "-c", script}, nil
	}
	words := strings.Fields(script)
	if strings.ContainsAny(script, shellSyntax) || strings.Contains(words[0], "=") {
		return nil, fmt.Errorf("the script needs a shell, and there is no %s here; "+
			"only a program with plain arguments can run", shell)
	}
	return words, nil
}

// shellSyntax are the characters that would mean something to a shell.
const shellSyntax = "|&;<>()$`\\\"'*?[]{}~#!\n"

func checkEvents(events []string) error {
	for _, ev := range events {
		if !isEvent(ev) {
			return fmt.Errorf("unknown event %.60q; there are %s, user:NAME, query:NAME and * "+
				"(a script that holds a '=' is written *=SCRIPT)", ev, strings.Join(eventNames[1:], ", "))
		}
	}
	return nil
}

// isEvent reports whether ev can stand for events in a spec.
func isEvent(ev string) bool {
	if ev == "*" {
		return true
	}
	kind, name, hasName := strings.Cut(ev, ":")
	if hasName {
		return name != "" && (kind == eventUser.String() || kind == eventQuery.String())
	}
	return slices.Contains(eventNames[1:], kind)
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
	if d.Coalesce {
		// The last event is the one that came last: those of one sender come in the order in which they were sent, and those
		// of several have none.
		if at := slices.IndexFunc(h.queue, func(q delivery) bool { return q.Coalesce && q.Name == d.Name }); at >= 0 {
			h.queue = slices.Delete(h.queue, at, at+1)
		}
	}

	if len(h.queue) == queueLimit {
		h.queue = h.queue[1:]
		h.droppedTotal++
		h.dropped++
		if h.dropped == 1 {
			h.handlers.log.printf(levelWarn, "handler '%s' is behind: %d events wait, dropping the oldest", h.spec, queueLimit)
		}
	}
	h.queue = append(h.queue, d)
	if !h.working {
		h.working = true
		h.handlers.workers.Go(h.work)
	}
}

// take removes what the next run is about: consecutive member events of one kind, one user event, or one query. When
// nothing waits it returns nil, and the worker has to stop.
func (h *handler) take() []delivery {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queue) == 0 {
		h.working = false
		h.queue = nil // lets go of what a burst has taken
		return nil
	}
	if h.dropped > 0 {
		h.handlers.log.printf(levelWarn, "handler '%s' was behind: %d events dropped", h.spec, h.dropped)
		h.dropped = 0
	}

	n := 1
	kind := h.queue[0].kind
	for kind < eventUser && n < len(h.queue) && h.queue[n].kind == kind {
		n++
	}
	batch := h.queue[:n:n]
	h.queue = h.queue[n:]
	return batch
}

// info is what is known of the handlers: group, key, value; and so on. The keys are Serf's, EVENT:NAME; one may come more
// than once.
func (hs *handlers) info() (facts []string) {
	add := func(key, value string) { facts = append(facts, "event_handlers", key, value) }
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
		if !h.runningSince.IsZero() {
			add(events+" running since", h.runningSince.Format(time.DateTime))
		}
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

// run runs the handler's script once, to its end or its timeout, and reports the result.
func (h *handler) run(batch []delivery) {
	event := batch[0]
	started := time.Now()
	h.noteStart(started)
	slow := time.AfterFunc(slowAfter, func() {
		h.handlers.log.printf(levelWarn, "handler '%s' has been running for %v, since %s: its other events wait", h.spec, slowAfter,
			started.Format(time.DateTime))
	})
	var printed, answer outputCapture // answer: what a query's handler prints to stdout
	status := h.runScript(batch, &printed, &answer)
	slow.Stop()

	end := "well"
	if status != "" {
		end = status
	}
	end += fmt.Sprintf(" after %v", time.Since(started).Round(time.Millisecond))
	h.noteEnd(end + ", " + started.Format(time.DateTime))
	output := string(answer.last) + string(printed.last)
	h.handlers.log.printf(levelDebug, "Event '%s' script output: %s", event.kind, output)
	if status != "" {
		h.handlers.log.printf(levelWarn, "handler '%s' failed on %s: %s: %s", h.spec, oneLine(event.title()), end, lastLine(output))
	}

	if event.answer != nil {
		event.answer(replyTo(status, &printed, &answer))
	}
}

func (h *handler) noteStart(at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.runningSince = at
}

func (h *handler) noteEnd(how string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = how
	h.runningSince = time.Time{}
}

// title is the event as a spec has it, such as user:deploy.
func (ev Event) title() string {
	if ev.Name == "" {
		return ev.kind.String()
	}
	return ev.kind.String() + ":" + ev.Name
}

func lastLine(output string) string {
	output = strings.TrimSpace(output)
	if output == "" {
		return "(no output)"
	}
	return oneLine(output[strings.LastIndex(output, "\n")+1:])
}

// replyTo is what the asker of a query gets: what was printed to stdout or, where the script has failed, its status and
// all that it printed. What does not fit is cut, and that is said.
func replyTo(status string, printed, answer *outputCapture) (reply, []byte) {
	kind := replyDone
	text := string(answer.first)
	size := answer.size
	if status != "" {
		kind = replyFailed
		text = status + "\n" + text + string(printed.first)
		size += len(status) + 1 + printed.size
	}
	if size > maxPayload {
		note := fmt.Sprintf("... (cut: %d bytes)\n", size)
		text = text[:maxPayload-len(note)] + note
	}
	return kind, []byte(text)
}

// runScript runs the script in a process group of its own. The status says what was wrong with its end, if anything.
func (h *handler) runScript(batch []delivery, printed, answer *outputCapture) (status string) {
	ctx := h.handlers.ending
	if timeout := h.handlers.runTimeout(); timeout > 0 {
		limited, cancel := context.WithTimeoutCause(ctx, timeout, errors.New("timed out"))
		defer cancel()
		ctx = limited
	}
	cmd := exec.CommandContext(ctx, h.argv[0], h.argv[1:]...)
	cmd.Cancel = func() error {
		endGroup(cmd.Process.Pid, h.handlers.ending)
		return nil
	}
	cmd.WaitDelay = pipesFor // of stdin, which a child in the background may hold open
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = h.environ(batch[0].Event)
	cmd.Stdin = strings.NewReader(stdinFor(batch))

	stdout := printed
	err := printed.open()
	if batch[0].answer != nil && err == nil {
		stdout = answer
		err = answer.open()
	}
	if err == nil {
		cmd.Stdout = stdout.w
		cmd.Stderr = printed.w
		err = cmd.Run()
	}
	printed.close()
	answer.close()

	if cmd.Process == nil && ctx.Err() != nil {
		return fmt.Sprintf("cannot start: %v", context.Cause(ctx))
	}
	if cmd.Process == nil {
		return fmt.Sprintf("cannot start: %v", err)
	}
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return ""
	}
	if ctx.Err() != nil {
		return fmt.Sprintf("%v, %v", context.Cause(ctx), cmd.ProcessState)
	}
	return err.Error()
}

// endGroup ends a process group: TERM, then KILL for what is still there, the leader or what it left behind.
func endGroup(pgid int, ending context.Context) {
	syscall.Kill(-pgid, syscall.SIGTERM)
	// One process of the group is watched. Another one is searched for only when that has ended: to search is to ask about
	// every process of the host.
	survivor := pgid
	for began := time.Now(); syscall.Kill(-pgid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if !runsInGroup(survivor, pgid) {
			survivor = findInGroup(pgid)
		}
		if survivor == 0 {
			return // only zombies are left, which nobody has reaped
		}
		took := time.Since(began)
		if took > killAfter || took > closeKillAfter && ending.Err() != nil {
			break
		}
	}
	syscall.Kill(-pgid, syscall.SIGKILL)
}

// runsInGroup reports whether a process is of the group and no zombie. Where there is no /proc, all run.
func runsInGroup(pid, pgid int) bool {
	if group, err := syscall.Getpgid(pid); err != nil || group != pgid {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		_, noProc := os.Stat("/proc/self/stat")
		return noProc != nil
	}
	_, fields, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ") // the name before it may hold anything
	return fields != "" && fields[0] != 'Z' && fields[0] != 'X'
}

// findInGroup is a process of the group that runs; 0: there is none.
func findInGroup(pgid int) int {
	proc, err := os.Open("/proc")
	if err != nil {
		return pgid // it cannot be found out
	}
	defer proc.Close()
	names, _ := proc.Readdirnames(-1)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && runsInGroup(pid, pgid) {
			return pid
		}
	}
	return 0
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
	s = strings.NewReplacer("\n", " ", "\r", " ").Replace(s)
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}

// ---- what scripts are told ----

// stdinFor is what a script reads: Serf's line for each member, or the payload.
func stdinFor(batch []delivery) string {
	if batch[0].kind >= eventUser {
		payload := string(batch[0].Payload)
		if payload == "" {
			return ""
		}
		return strings.TrimSuffix(payload, "\n") + "\n"
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
	aloneValue := ""
	if alone {
		aloneValue = "1"
	}
	env := []string{
		"SERF_SELF_NAME=" + self.Name,
		"SERF_SELF_ROLE=" + self.Tags.asMap()["role"],
		"SERF_SELF_ADDR=" + self.Addr.String(),
		"SERF_RPC_ADDR=" + rpcAddr,
		"SERF_RPC_AUTH=" + rpcAuth,
		"SERF_SELF_ALONE=" + aloneValue,
	}
	odd := regexp.MustCompile("[^0-9A-Z]") // in the name of a variable
	for _, tag := range splitNUL(self.Tags) {
		k, v, _ := strings.Cut(tag, "=")
		env = append(env, "SERF_TAG_"+odd.ReplaceAllString(strings.ToUpper(k), "_")+"="+v)
	}
	return env
}

// waitAtMost reports whether wait returned within d.
func waitAtMost(d time.Duration, wait func()) bool {
	ctx, done := context.WithTimeout(context.Background(), d)
	go func() { wait(); done() }()
	<-ctx.Done()
	return errors.Is(ctx.Err(), context.Canceled)
}
